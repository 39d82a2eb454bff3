"""A user's own data: where they are found, how they are split once and for all, and what identifies them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from bitfront.data import folders, identified
from bitfront.data.folders import completed, labelled, split_files, split_folders, splits
from bitfront.data.identified import fingerprint, outline
from bitfront.errors import BitfrontError

NAMES = [f"{label}/{i}.png" for label, n in (("a", 31), ("b", 10), ("c", 3), ("d", 2)) for i in range(n)]
GROUPS = {name: name[0] for name in NAMES}


def counts(parts: dict[str, list[str]], group: str = "") -> list[int]:
    return [sum(name.startswith(group) for name in parts[split]) for split in ("train", "valid", "test")]


def test_data_are_found_below_the_working_directory_or_data_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert folders.find("there", "root").samefile(tmp_path / "root" / "there")
    (tmp_path / "there").mkdir()
    assert folders.find("there", "root").samefile(tmp_path / "there")
    assert folders.find(str(tmp_path / "root"), "elsewhere").samefile(tmp_path / "root")
    with pytest.raises(BitfrontError, match=r"there is no data=gone.*/gone.*/root/gone"):
        folders.find("gone", "root")


def test_splits_are_of_each_class_and_reproducible(tmp_path: Path) -> None:
    parts = splits(NAMES, tmp_path / "a.json", GROUPS)
    assert sorted(sum(parts.values(), [])) == sorted(NAMES)
    assert [counts(parts, group) for group in "abcd"] == [[23, 4, 4], [8, 1, 1], [1, 1, 1], [2, 0, 0]]
    assert splits(list(reversed(NAMES)), tmp_path / "b.json", GROUPS) == parts  # whatever the order and the place
    assert counts(splits(NAMES, tmp_path / "c.json")) == [36, 5, 5]


def test_splits_are_remembered_as_data_come_and_go(tmp_path: Path) -> None:
    memory = tmp_path / "below" / "memory.json"
    before = splits(NAMES, memory, GROUPS)
    more = [f"a/new{i}.png" for i in range(1000)]
    gone = before["test"][0]
    names = [name for name in NAMES + more if name != gone]
    after = splits(names, memory, GROUPS | dict.fromkeys(more, "a"))
    for split, part in before.items():
        assert set(part) - {gone} == set(after[split]) & set(NAMES)
    for split, share in (("valid", 0.1), ("test", 0.1), ("train", 0.8)):
        assert len(set(after[split]) & set(more)) / 1000 == pytest.approx(share, abs=0.03)
    again = splits([*names, gone], memory, GROUPS | dict.fromkeys(more, "a"))
    assert gone in again["test"] and all(set(after[split]) <= set(again[split]) for split in again)


def test_the_splits_that_a_user_has_stay(tmp_path: Path) -> None:
    train, rest = NAMES[:30], NAMES[30:]
    given = {"train": train, "valid": rest[:3], "test": rest[3:]}
    assert completed(given, tmp_path / "a") == {split: sorted(names) for split, names in given.items()}
    for missing in ("valid", "test"):  # where only valid is there, it tests, and a tenth of train validates
        parts = completed({"train": train, ("test" if missing == "valid" else "valid"): rest}, tmp_path / missing)
        assert parts["test"] == sorted(rest) and [len(parts[s]) for s in ("train", "valid")] == [27, 3]
        assert sorted(parts["train"] + parts["valid"]) == sorted(train)
    assert completed({"train": NAMES}, tmp_path / "b") == splits(NAMES, tmp_path / "c")
    for bad in ({"test": rest}, {"train": train, "valid": []}):
        with pytest.raises(BitfrontError, match="nothing in"):
            completed(bad, tmp_path / "d")


def test_too_few_samples_and_a_damaged_memory_are_said(tmp_path: Path) -> None:
    with pytest.raises(BitfrontError, match="none for valid"):
        splits(["a", "b"], tmp_path / "few.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(BitfrontError, match="delete it"):
        splits(NAMES, tmp_path / "bad.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(BitfrontError, match="data_root=<folder>"):
        splits(NAMES, tmp_path / "file" / "memory.json")


def test_split_names(tmp_path: Path) -> None:
    for name in ("Training", "val", "testing", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.TXT").write_text("")
    assert {k: p.name for k, p in split_folders(tmp_path).items()} == {
        "train": "Training", "valid": "val", "test": "testing",
    }  # fmt: skip
    assert [p.name for p in split_files(tmp_path, [".txt"]).values()] == ["Training.TXT", "val.TXT", "testing.TXT"]
    (tmp_path / "dev").mkdir()
    with pytest.raises(BitfrontError, match="both for valid"):
        split_folders(tmp_path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three classes of four files."""
    for label in "abc":
        (tmp_path / "tree" / label).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "tree" / label / f"{i}.x").write_text(f"{label}{i}")
    return tmp_path / "tree"


def test_classes_are_folders(tree: Path, tmp_path: Path) -> None:
    (tree / "a" / "notes.txt").write_text("")
    (tree / ".hidden").mkdir()
    names, parts = labelled(tree, [".x"], tmp_path / "m")
    assert names == ["a", "b", "c"] and [len(parts[s]) for s in ("train", "valid", "test")] == [6, 3, 3]
    assert all(path.read_text()[0] == names[label] for part in parts.values() for path, label in part)
    shutil.copytree(tree, tree / "train")
    with pytest.raises(BitfrontError, match=r"tree/a' is no split"):
        labelled(tree, [".x"], tmp_path / "m")
    for label in "abc":
        shutil.rmtree(tree / label)
    shutil.copytree(tree / "train", tree / "test")
    names, parts = labelled(tree, [".x"], tmp_path / "n")
    assert names == ["a", "b", "c"] and [len(parts[s]) for s in ("train", "valid", "test")] == [9, 3, 12]
    shutil.rmtree(tree / "test" / "b")  # labels stay those of train
    assert {label for _, label in labelled(tree, [".x"], tmp_path / "n")[1]["test"]} == {0, 2}
    (tree / "test" / "other").mkdir()
    with pytest.raises(BitfrontError, match=r"test/other' is of a class that train has not"):
        labelled(tree, [".x"], tmp_path / "n")


def test_a_class_may_be_named_train(tree: Path, tmp_path: Path) -> None:
    (tree / "c").rename(tree / "train")
    assert labelled(tree, [".x"], tmp_path / "m")[0] == ["a", "b", "train"]


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (lambda tree: (tree / "d").mkdir(), "tree/d' holds no file of .x"),
        (lambda tree: [shutil.rmtree(tree / label) for label in "bc"], "has 1 class folders, and two are needed"),
        (lambda tree: [(tree / "abc"[i]).rename(tree / folders.SPLITS[i]) for i in range(3)], "has 0 class folders"),
    ],
)  # fmt: skip
def test_another_layout_is_refused(tree: Path, tmp_path: Path, change: object, answer: str) -> None:
    change(tree)  # type: ignore[operator]
    with pytest.raises(BitfrontError, match=answer):
        labelled(tree, [".x"], tmp_path / "m")


def test_a_fingerprint_is_of_names_and_contents_alone(tree: Path, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    before = fingerprint(tree, root)
    shutil.copytree(tree, tmp_path / "elsewhere")
    (tree / ".hidden").write_text("x")
    os.utime(tree / "a" / "0.x", (1, 1))
    assert fingerprint(tmp_path / "elsewhere", root) == fingerprint(tree, root) == before
    (tree / "a" / "0.x").write_text("A0")  # of the same size
    changed = fingerprint(tree, root)
    (tree / "a" / "0.x").rename(tree / "a" / "9.x")
    assert len({before, changed, fingerprint(tree, root)}) == 3
    (tmp_path / "x").write_text("text")
    (tmp_path / "y").write_text("text")
    assert fingerprint(tmp_path / "x", root) == fingerprint(tmp_path / "y", root) != before


def test_contents_are_read_once(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = identified._content
    monkeypatch.setattr(identified, "_content", lambda path: read.append(path) or real(path))
    for path in tree.rglob("*.x"):
        os.utime(path, (1e9, 1e9))
    os.utime(tree / "a" / "0.x")  # just written: it may change again without another time
    first = fingerprint(tree, str(tmp_path))
    assert len(read) == 12 and fingerprint(tree, str(tmp_path)) == first and len(read) == 13
    (tmp_path / "file").write_text("")  # where nothing can be kept, all are read
    assert fingerprint(tree, str(tmp_path / "file")) == first and len(read) == 25


def test_an_outline_sees_names_sizes_and_beginnings(tree: Path) -> None:
    known = outline(tree)
    (tree / ".hidden").write_text("x")
    assert outline(tree) == known
    file = next(path for path in sorted(tree.rglob("*")) if path.is_file() and not path.name.startswith("."))
    content = file.read_bytes()
    for changed in (content + b"x", b"x" + content[1:]):
        file.write_bytes(changed)
        assert outline(tree) != known
    file.write_bytes(content)
    assert outline(tree) == known
    file.rename(file.with_name("another"))
    assert outline(tree) != known


def test_what_cannot_be_identified_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BitfrontError, match="no file in"):
        fingerprint(tmp_path / "empty", str(tmp_path))


def test_links_are_followed_and_circles_end(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a").symlink_to(tree / "a")
    (tmp_path / "links" / "round").symlink_to(tmp_path / "links")
    assert [path.name for path in folders.files(tmp_path / "links")] == ["0.x", "1.x", "2.x", "3.x"]
