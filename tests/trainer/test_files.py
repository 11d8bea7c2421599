"""Files are replaced in one step, whatever is at their path."""

from __future__ import annotations

import json

from cwdpo_trainer.files import write_json, write_text


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "target.json").write_text("old")
    link, dangling = tmp_path / "link.json", tmp_path / "dangling.json"
    link.symlink_to("folder/target.json")
    dangling.symlink_to("folder/new.json")
    for path in (link, dangling):
        write_json(path, {"a": 1})
        assert path.is_symlink()
        assert json.loads(path.read_text()) == {"a": 1}
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["new.json", "target.json"]


def test_a_name_that_is_no_utf8_is_escaped(tmp_path):
    write_text(tmp_path / "card.md", "runs/caf\udce9")
    assert (tmp_path / "card.md").read_bytes() == rb"runs/caf\udce9"
