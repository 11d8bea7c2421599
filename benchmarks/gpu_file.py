"""The result file of `benchmarks.gpu` and `benchmarks.tune`: replaced after every row, continued by `--resume`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.cost import Cost

# The lists of rows, and what identifies a row.
KEYS = {
    "values": ("case", "value"), "measurements": ("shape", "op"), "shared": ("lengths", "way"),
    "candidates": ("dim", "dtype", "config"),
    "tuned": ("dim", "dtype", "config", "kernel"),
}  # fmt: skip
TEXTS: dict[str, Callable[[dict], str]] = {
    "values": lambda row: f"{row['case']:32}{row['value']:16}{row['error']:.2e}, eager {row['eager_error']:.2e}",
    "measurements": lambda row: f"{row['shape']:16}{row['op']:48}{row['ms']:9.2f} ms{row['extra_gib']:8.2f} GiB",
    "shared": lambda row: f"prompt {row['lengths']:16}{row['way']:48}{row['ms']:9.2f} ms{row['extra_gib']:8.2f} GiB",
    "candidates": lambda row: f"D {row['dim']:<6}{row['problem'] or 'compiled':40}{row['config']}",
    "tuned": lambda row: f"D {row['dim']:<6}{row['kernel']:20}{row['ms']:9.3f} ms  {row['config']}",
}
LEFT_OUT = "left out: "  # how the reason of an item starts that --resume tries again
MACHINE = ("device", "torch", "triton", "python", "commit")  # one file holds the results of one of these


def read(path: Path, like: dict) -> dict:
    """The data of a file to go on from. Raises SystemExit if it is not one that this version of the program writes."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        problem = f"no JSON ({error})"
    else:
        problem = misfit(found, like)
    if problem:
        raise SystemExit(
            f"{path}: expected results that --resume can go on from, got {problem}: run without --resume, which "
            "renames this file, or choose another --out"
        )
    return found


def misfit(found: object, like: dict) -> str:
    """What makes `found` no data of a Report, or ""."""
    if not isinstance(found, dict):
        return f"a {type(found).__name__}"
    kinds = {key: type(value) for key, value in like.items()} | dict.fromkeys(KEYS, list)
    for key, kind in kinds.items():
        if not isinstance(found.get(key, kind()), kind):
            return f"`{key}` of type {type(found[key]).__name__}"
    if (machine := found.get("environment")) and (missing := {*MACHINE, "versions"} - machine.keys()):
        return f"an environment without {', '.join(sorted(missing))}"
    for name, keys in KEYS.items():
        if any(not isinstance(row, dict) or {*keys} - row.keys() for row in found.get(name, ())):
            return f"a row of `{name}` without {' or '.join(keys)}"
    return ""


class Report:
    """What has been measured so far. Every addition replaces the file and prints a line.

    data: `environment`; lists of rows (KEYS); `limits` by shape; `compiled` and `tests`; `failed`, name -> reason;
    `done`, the names of finished items. Items that failed are finished, items that were left out are not.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        self.path = path
        self.data: dict = {"environment": {}, "values": [], "limits": {}, "measurements": [], "failed": {}, "done": []}
        if resume and path.exists():
            self.data |= read(path, self.data)
            failed = self.data["failed"].items()
            self.data["failed"] = {name: reason for name, reason in failed if not reason.startswith(LEFT_OUT)}

    def write(self) -> None:
        """Replace the file in one step, so that a reader never sees half of it."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(partial, self.path)

    def set_environment(self, found: dict) -> None:
        """Store the environment of the first process; later ones add the versions of their packages.

        Raises SystemExit if the file holds results of another machine, other versions or another commit.
        """
        stored = self.data["environment"] or found
        for key in MACHINE:
            if stored[key] != found[key]:
                raise SystemExit(
                    f"{self.path}: expected {key} to have value {stored[key]!r}, got {found[key]!r}: a file holds the "
                    "results of one machine and commit; run without --resume or choose another --out"
                )
        self.data["environment"] = {**stored, "versions": {**found["versions"], **stored["versions"]}}
        self.write()

    def finished(self, name: str) -> bool:
        return name in self.data["done"]

    def add(self, kind: str, row: dict) -> None:
        """Add a row. It replaces an earlier one with the same keys, of an item that was cut."""
        if kind in KEYS:
            same = [x for x in self.data.get(kind, []) if any(x[key] != row[key] for key in KEYS[kind])]
            self.data[kind] = [*same, row]
            text = TEXTS[kind](row)
        elif kind == "test":
            text = self._add_test(row)
        else:
            self.data.setdefault(kind, {}).update(row)
            text = f"{kind}: {json.dumps(row)[:100]}"
        self._compare_with_limits()
        self.write()
        print(text, flush=True)

    def _compare_with_limits(self) -> None:
        """Give every row its share of the limit: the time that its operations and bytes need over the time it took."""
        for row in self.data["measurements"]:
            limit = self.data["limits"].get(row["shape"])
            if limit and "flops" in row:
                seconds = Cost(row["flops"], row["bytes"]).seconds(limit["flops_per_s"], limit["bytes_per_s"])
                row["of_limit"] = seconds * 1e3 / row["ms"]

    def _add_test(self, row: dict) -> str:
        """Count the outcome of a test: `passed` and `skipped` are numbers, `failed` has the reason of each."""
        tests = self.data.setdefault("tests", {})
        tests.setdefault("failed", {})
        if row["outcome"] == "failed":
            tests["failed"][row["test"]] = row["reason"]
        else:
            tests[row["outcome"]] = tests.get(row["outcome"], 0) + 1
        return f"test {row['outcome']}: {row['test']}"

    def forget_tests(self) -> None:
        """Before the tests run again: a run that was cut may have counted some."""
        for outcome in ("passed", "skipped", "failed"):
            self.data.get("tests", {}).pop(outcome, None)

    def done(self, name: str) -> None:
        self.data["done"].append(name)
        self.data["failed"].pop(name, None)
        self.write()

    def fail(self, name: str, reason: str) -> None:
        """Record why an item has no result. It is finished, unless the reason starts with LEFT_OUT."""
        self.data["failed"][name] = reason
        if not reason.startswith(LEFT_OUT) and name not in self.data["done"]:
            self.data["done"].append(name)
        self.write()
        print(f"failed: {name} ({reason})", flush=True)

    def left_out(self) -> list[str]:
        """The items that the time budget left out."""
        return [name for name, reason in self.data["failed"].items() if reason.startswith(LEFT_OUT)]


def open_report(path: Path, resume: bool) -> Report:
    """The report at `path`. Without `resume`, an earlier file is renamed: gpu.json to gpu-1.json, gpu-2.json ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not resume:
        number = 1
        while (kept := path.with_name(f"{path.stem}-{number}.json")).exists():
            number += 1
        path.rename(kept)
    return Report(path, resume)
