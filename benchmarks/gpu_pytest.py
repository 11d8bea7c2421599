"""The pytest plugin of the test processes that benchmarks/gpu_tests.py starts.

`--shard K/N` runs every N-th test, from the K-th on (K from 0). With `--record FILE` none of our kernels is launched:
the tests fail, and FILE lists what they would have compiled. `--fd` is a pipe that receives the outcome of every test.
"""

from __future__ import annotations

import json
import os
from dataclasses import astuple
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu benchmarks")
    group.addoption("--shard", default="0/1")
    group.addoption("--record", type=Path)
    group.addoption("--fd", type=int)


def pytest_configure(config: pytest.Config) -> None:
    from benchmarks import ahead

    ahead.fix_keys()
    if config.getoption("--record"):
        config.gpu_recording = ahead.recorded()  # type: ignore[attr-defined]
        config.gpu_launches = config.gpu_recording.__enter__()  # type: ignore[attr-defined]


def pytest_unconfigure(config: pytest.Config) -> None:
    if path := config.getoption("--record"):
        launches = config.gpu_launches  # type: ignore[attr-defined]
        path.write_text(json.dumps([astuple(launch) for launch in launches]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first, count = map(int, config.getoption("--shard").split("/"))
    items[:] = items[first::count]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = (yield).get_result()
    descriptor = item.config.getoption("--fd")
    if descriptor is None or (report.when != "call" and report.passed):
        return
    values = {"test": item.nodeid, "outcome": report.outcome}
    if report.failed:
        values["reason"] = str(report.longrepr).splitlines()[-1][:300]
    # One short write, so that those of several processes do not mix.
    os.write(descriptor, (json.dumps({"row": "test", "values": values}) + "\n").encode())
