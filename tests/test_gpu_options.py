"""`benchmarks.gpu` with options that are wrong, files that it cannot go on from, and signals: what it says."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from killed_runs import rows, running

from benchmarks import gpu, gpu_file

ENVIRONMENT = dict.fromkeys(("device", "torch", "triton", "commit", "versions"), "x")  # but no "python"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", r"no JSON \(Expecting value"),
        ('{"environment": {}, "val', r"no JSON \(Unterminated string"),
        ("[1]", "a list"),
        ('{"done": {}}', "`done` of type dict"),
        (json.dumps({"environment": ENVIRONMENT}), "an environment without python"),
        ('{"values": [{"case": "bfloat16", "error": 1}]}', "a row of `values` without case or value"),
    ],
)
def test_resume_refuses_a_file_that_it_cannot_go_on_from(tmp_path, text, problem):
    (tmp_path / "gpu.json").write_text(text)
    with pytest.raises(SystemExit, match=f"gpu.json: expected results .*, got {problem}.*: run without --resume"):
        gpu_file.open_report(tmp_path / "gpu.json", True)
    assert (tmp_path / "gpu.json").read_text() == text


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--out", "a file", "--out: expected a folder to write into, got "),
        ("--wheels", "missing", r"--wheels: expected a folder with wheels \(\*.whl\), got "),
        ("--budget-s", "0", "expected a number of seconds > 0, got 0"),
        ("--budget-s", "nan", "expected a number of seconds > 0, got nan"),
    ],
)
def test_a_wrong_option_says_what_was_expected(tmp_path, monkeypatch, capsys, option, value, problem):
    """Before an earlier file is renamed."""
    monkeypatch.setattr("signal.signal", lambda *args: None)  # it would replace pytest's
    (tmp_path / "a file").touch()
    (tmp_path / "gpu.json").write_text("{}")
    path = value if option == "--budget-s" else str(tmp_path / value)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), option, path])
    with pytest.raises(SystemExit) as caught:
        gpu.main()
    assert re.search(problem, f"{caught.value} {capsys.readouterr().err}")
    assert (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_signal_ends_a_run_with_a_word_of_what_to_do(tmp_path, number):
    with running(tmp_path, "--parts", "values", stderr=subprocess.STDOUT) as process:
        for _ in process.stdout:
            os.kill(process.pid, number)
            break
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.splitlines()[-1] == "ended by a signal; go on with --resume"
    rows(tmp_path)
