"""The README and docs/benchmarks.md agree with the result files."""

import copy
import re
from pathlib import Path

import pytest

from benchmarks import overview, report

HINT = "run `python -m benchmarks.report`"


@pytest.fixture(scope="module")
def reports():
    return report.load()


def test_the_page_matches_the_results(reports):
    assert report.PAGE.read_text() == report.page(reports), HINT


def test_the_readme_matches_the_results(reports):
    readme = report.README.read_text()
    assert readme == report.with_table(readme, reports), HINT


def test_the_ratios_of_shared_prompts_are_those_of_the_results(reports):
    """Sentences of the README and the notes quote them; they are not generated."""

    def words(ratio):
        return f"{ratio['median_seconds']:.2f} of the time and {ratio['extra_mib']:.2f} of the memory"

    readme = " ".join(report.README.read_text().split())
    shared, trl = ({entry["name"]: entry for entry in reports[suite]["measurements"]} for suite in ("sharing", "trl"))
    assert f"{words(shared['image']['shared_to_separate'])} of a step without sharing" in readme
    ours = trl["image"]["to_trl"]["CoolingDPOTrainer, prefix_sharing"]
    assert f"{words(ours)} that TRL's own trainer needs" in readme
    notes = (report.ROOT / "docs" / "notes.md").read_text()
    notes = notes[notes.index("**Where shared prompts pay**") :].split("\n\n")[0]
    for name, entry in shared.items():
        if name.startswith("ratio/"):
            ratio = entry["shared_to_separate"].values()
            assert all(f"{value:.2f}" in notes for value in ratio), (name, ratio)


def test_the_plot_of_the_readme_is_that_of_the_results(reports):
    assert (report.IMAGES / "overview.svg").read_text() == overview.svg(reports), HINT


def test_a_changed_result_changes_the_text(reports):
    drifted = copy.deepcopy(reports)
    for entry in drifted["linear"]["measurements"]:
        entry["results"]["cwdpo_kernels"]["median_seconds"] *= 1.5
    assert report.page(drifted) != report.page(reports)
    assert report.readme_table(drifted) != report.readme_table(reports)
    assert overview.svg(drifted) != overview.svg(reports)


def test_every_plot_is_there_and_every_implementation_is_in_the_legend(reports, tmp_path):
    plots = pytest.importorskip("benchmarks.plots", reason="matplotlib")
    shown = re.findall(r"\(images/(.*)\.svg\)", report.page(reports))
    assert sorted(shown) == sorted(report.PLOTS)
    plots.draw(reports, tmp_path)
    for name in shown:
        assert (report.IMAGES / f"{name}.svg").exists(), HINT
        assert (tmp_path / f"{name}.svg").stat().st_size < 200_000
    measured = {name for entry in reports["sweeps"]["measurements"] for name in entry["results"]}
    assert measured <= plots.STYLES.keys()


@pytest.mark.parametrize(
    ("value", "text"), [(12.34, "12"), (4.09, "4.1"), (0.3105, "0.31"), (0.0523, "0.052"), (0.00213, "0.0021")]
)
def test_seconds_have_two_digits(value, text):
    assert report.seconds(value) == text


def test_errors_memory_and_commits():
    assert report.short("0123456789abcdef0123+changes") == "0123456789ab+changes"
    assert report.error(4.15e-8) == "4.2e-8"
    assert report.error(None) == ""
    assert [report.mib(x) for x in (2304.8, 6.82, -0.3)] == ["2305", "6.8", "0.0"]


def test_no_other_figure_of_time_or_memory_in_the_readme():
    """Measured values appear only between the markers, where they come from the result files."""
    before, rest = Path(report.README).read_text().split(report.BEGIN)
    text = before + rest.split(report.END)[1]
    assert not re.findall(r"\d+(?:\.\d+)? (?:s|ms|MiB|GiB)\b", text)
