"""Console output: one process prints, and progress bars stay intact."""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path

import pytest
from tqdm.auto import tqdm

import cwdpo_trainer
from cwdpo_trainer.reporter import progress, say, say_error


def test_only_rank_0_prints(monkeypatch, capsys):
    say("without a launcher")
    monkeypatch.setenv("RANK", "0")
    say("from rank 0")
    monkeypatch.setenv("RANK", "1")
    say("from rank 1")
    assert capsys.readouterr().out == "without a launcher\nfrom rank 0\n"


@pytest.mark.parametrize(
    ("encoding", "errors", "printed"),
    [
        ("ascii", "strict", rb"caf\xe9 \udce9 \u0394"),
        ("latin-1", "strict", b"caf\xe9 \\udce9 \\u0394"),
        ("utf-8", "strict", b"caf\xc3\xa9 \\udce9 \xce\x94"),
        ("utf-8", "surrogateescape", b"caf\xc3\xa9 \xe9 \xce\x94"),
    ],
)
def test_what_the_output_cannot_encode_is_escaped(monkeypatch, encoding, errors, printed):
    """A file name that is no UTF-8 reaches Python as half surrogate pairs."""
    buffer = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(buffer, encoding, errors, write_through=True))
    say("café \udce9 Δ")
    assert buffer.getvalue() == printed + b"\n"


def test_every_rank_reports_errors(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    say_error("disk full")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "disk full\n")


def test_messages_appear_above_a_progress_bar(capsys):
    bar_output = io.StringIO()
    with tqdm(total=2, file=bar_output) as bar:
        bar.update()
        say("a message")
    assert capsys.readouterr().out == "a message\n"
    assert bar_output.getvalue().endswith("\n")


def test_only_rank_0_shows_a_bar(monkeypatch, capsys):
    assert list(progress(range(3), "rows")) == [0, 1, 2]
    assert "rows" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert list(progress(range(3), "rows")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


PACKAGE = Path(cwdpo_trainer.__file__).parent


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_else_prints(path):
    if path.name == "reporter.py":
        return
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    others = re.compile(r"print|(.*\.)?tqdm(\.\w+)?|.*bar\.write|(.*\.)?getLogger")
    assert not [call.lineno for call in calls if others.fullmatch(ast.unparse(call))]


def test_a_redirected_log_shows_progress_as_lines(monkeypatch, capsys):
    monkeypatch.setattr("cwdpo_trainer.reporter.SECONDS", 0.0)
    assert list(progress(range(3), "rows")) == [0, 1, 2]
    with progress(None, "probe 5: chosen", total=12, leave=False) as bar:
        bar.update(8)
        bar.update(4)
    with progress(None, "", total=12, disable=True) as bar:
        bar.update(8)
    lines = capsys.readouterr().err.splitlines()
    probes = ["probe 5: chosen: 8 of 12", "probe 5: chosen: 12 of 12"]
    assert lines == [*(f"rows: {n} of 3" for n in (1, 2, 3)), *probes]


def test_a_redirected_log_has_no_lines_about_short_work(capsys):
    assert list(progress(range(3), "rows", delay=2)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
