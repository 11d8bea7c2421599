"""Console output: one process prints, and progress bars stay intact."""

from __future__ import annotations

import io

from tqdm.auto import tqdm

from cwdpo_trainer.reporter import say, say_error


def test_only_rank_0_prints(monkeypatch, capsys):
    say("without a launcher")
    monkeypatch.setenv("RANK", "0")
    say("from rank 0")
    monkeypatch.setenv("RANK", "1")
    say("from rank 1")
    assert capsys.readouterr().out == "without a launcher\nfrom rank 0\n"


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
