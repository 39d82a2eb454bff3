"""Data that is made once and kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bitfront.data.generated import kept
from bitfront.errors import BitfrontError


def write(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "one").write_text("1")
    (folder / "two").write_text("2")


def test_it_is_made_once(tmp_path: Path) -> None:
    folder = kept(tmp_path, "x-1", write)
    assert folder == tmp_path / "generated" / "x-1" and (folder / "a" / "one").read_text() == "1"
    assert kept(tmp_path, "x-1", lambda _: pytest.fail("made again")) == folder
    assert [path.name for path in folder.parent.iterdir()] == ["x-1"]


def test_what_is_changed_missing_or_added_is_named(tmp_path: Path) -> None:
    folder = kept(tmp_path, "x", write)
    for name, content in (("two", "3"), ("a/one", None), ("three", "3")):
        shutil.rmtree(folder)
        path = kept(tmp_path, "x", write) / name
        path.write_text(content) if content else path.unlink()
        with pytest.raises(BitfrontError, match=rf"{name}' is not as it was made; delete '.*x' and run again"):
            kept(tmp_path, "x", write)
    (folder / "SHA256SUMS").write_text("nonsense")
    with pytest.raises(BitfrontError, match=r"is not as it was made; delete '.*x'"):
        kept(tmp_path, "x", write)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(BitfrontError, match=r"could not write or read '.*x'.*delete it"):
        kept(tmp_path, "x", write)


def test_an_interrupted_making_leaves_nothing(tmp_path: Path) -> None:
    def killed(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, "x", killed)
    assert not list((tmp_path / "generated").iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "generated").write_text("a file")
    with pytest.raises(BitfrontError, match=r"could not write or read.*data_root=<folder>"):
        kept(tmp_path, "x", write)


def test_of_two_that_make_it_at_once_one_wins(tmp_path: Path) -> None:
    def slower(folder: Path) -> None:
        write(folder)
        kept(tmp_path, "x", write)

    assert (kept(tmp_path, "x", slower) / "two").read_text() == "2"
