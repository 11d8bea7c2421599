import cwdpo_kernels
from cwdpo_trainer.cli import main


def test_names_the_backend(capsys):
    assert main(["check"]) == 0
    assert f"backend on cpu    {cwdpo_kernels.backend('cpu')}" in capsys.readouterr().out


def test_says_what_helps_where_the_faster_backend_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(cwdpo_kernels, "missing_backend", lambda device: "not built: install a C++ compiler")
    main(["check"])
    assert "not built: install a C++ compiler" in capsys.readouterr().out
