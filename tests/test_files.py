from __future__ import annotations

import os
import stat

import pytest

from fusion.errors import UserError
from fusion.files import atomic_path, require_writable_folder, write_text


def test_a_file_appears_when_its_block_ends(tmp_path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.suffix == ".txt"
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_failure_leaves_what_was_there(tmp_path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("out of paper")

    with pytest.raises(RuntimeError, match="out of paper"):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_others_may_read_what_the_umask_allows(tmp_path) -> None:
    old = os.umask(0o022)
    try:
        write_text(tmp_path / "file", "text")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_a_folder_is_tried_without_a_trace(tmp_path) -> None:
    assert require_writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert require_writable_folder(tmp_path) == tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["/proc/nowhere", "file"])
def test_a_folder_that_cannot_be_written_to_is_told_with_its_option(tmp_path, where) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="report_save_path: cannot write to the folder"):
        require_writable_folder(tmp_path / where, "report_save_path")
