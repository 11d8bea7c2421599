"""The files that describe the project agree with each other: versions, make targets, test matrix."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import cwdpo_kernels

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def pinned(package: str) -> str:
    return re.search(rf"^{package}==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def lowest(requirements: list[str], package: str) -> str:
    return next(each.split(">=")[1] for each in requirements if each.split(">=")[0] == package)


def test_versions_agree():
    assert PROJECT["version"] == cwdpo_kernels.__version__ == load(ROOT / "CITATION.cff")["version"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_make_targets(path):
    makefile = (ROOT / "Makefile").read_text()
    commands = [step["run"] for job in load(path)["jobs"].values() for step in job["steps"] if "run" in step]
    targets = [command.split()[1] for command in commands if command.startswith("make ")]
    assert targets
    assert not [target for target in targets if f"\n{target}:" not in makefile]


def test_the_matrix_has_the_lowest_and_the_newest_versions():
    matrix = load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    classifiers = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if ":: Python :: " in each]
    assert matrix["python"] == classifiers
    old, new = matrix["include"]
    assert [old["torch"], new["torch"]] == matrix["torch"]
    assert old["torch"] == lowest(PROJECT["dependencies"], "torch") + ".0"
    assert old["transformers"] == lowest(PROJECT["optional-dependencies"]["trainer"], "transformers") + ".0"
    assert new["transformers"] == pinned("transformers")


def test_a_cpu_build_of_torch_is_tested_with_its_triton():
    """It does not require Triton, so without this pip would take the newest."""
    job = load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["test"]
    old, new = job["strategy"]["matrix"]["include"]
    (command,) = [step["run"] for step in job["steps"] if step.get("run", "").startswith("make test")]
    assert "torch==${{ matrix.torch }}+cpu triton==${{ matrix.triton }}" in command
    assert old["triton"] == lowest([each.split(";")[0] for each in PROJECT["dependencies"]], "triton") + ".0"
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"torch=={old['torch']}+cpu triton=={old['triton']}" in constraints
    assert f"For {new['torch']}, {new['triton']}." in constraints


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/guide.md", "Makefile", "tools/set_up.py"])
def test_the_tested_pythons_are_named_everywhere(name):
    versions = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if ":: Python :: " in each]
    text = " ".join((ROOT / name).read_text().split())
    assert f"{versions[0]} to {versions[-1]}" in text
    assert f"{versions[0]} or newer" not in text
    if name == "tools/set_up.py":
        assert f"TESTED = {tuple(versions)}".replace("'", '"') in text


def test_the_guide_names_the_setuptools_that_the_build_needs():
    (requirement,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert f"(and needs `{requirement}`)" in (ROOT / "docs" / "guide.md").read_text()


def test_the_commit_hook_runs_for_the_files_that_contributing_names():
    (hook,) = load(ROOT / ".pre-commit-config.yaml")["repos"][0]["hooks"]
    assert hook["types_or"] == ["python", "pyi", "toml"]
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    assert "every commit that changes a Python or TOML file runs `make lint` first" in text


def test_the_launch_files_are_found_wherever_the_trainer_is_installed():
    text = (ROOT / "docs" / "trainer.md").read_text()
    (code,) = re.findall(r"^launch=\$\(python -c \"(.*)\"\)/launch$", text, re.MULTILINE)
    folder = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    names = re.findall(r"--config_file \$launch/(\S+)", text)
    assert sorted(names) == sorted(path.name for path in (Path(folder) / "launch").glob("*.yaml"))
    for name in names:
        assert f"--config_file PATH/{name} " in (Path(folder) / "launch" / name).read_text()
    assert "--config_file trainer/" not in text


def test_the_description_on_pypi_has_no_dead_links_once_there_is_a_repository():
    """Relative links in README.md do not work on PyPI. CONTRIBUTING.md says what to do before the first upload."""
    readme = (ROOT / PROJECT["readme"]).read_text()
    relative = re.findall(r"\]\((?!https?://|#)", readme)
    if "Repository" in PROJECT["urls"]:
        assert not relative
    else:
        release = (ROOT / "CONTRIBUTING.md").read_text().partition("## Release")[2]
        assert "does not resolve relative links" in release
        assert "`Repository`" in release
