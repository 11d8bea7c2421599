"""The files that describe the project agree with each other: versions, make targets, test matrix."""

import re
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
