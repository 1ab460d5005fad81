"""A folder is replaced as a whole or not at all."""

import os

import pytest

from fastattn_compile import files


@pytest.fixture(params=["in one step", "by two renames"])
def folder(tmp_path, monkeypatch, request):
    """A folder with a file of each kind; with and without a system call that exchanges two folders."""
    if request.param == "by two renames":
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    made = tmp_path / "saved"
    (made / "inner").mkdir(parents=True)
    for name in ("ours", "theirs", "inner/theirs"):
        (made / name).write_text("old")
    return made


def read(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_what_is_written_replaces_what_is_dropped_goes_and_the_rest_stays(folder):
    with files.replaced_folder(folder, dropped=("ours",)) as staging:
        (staging / "new").write_text("new")
        assert read(folder)["ours"] == "old"
    assert read(folder) == {"new": "new", "theirs": "old", "inner/theirs": "old"}
    assert [p.name for p in folder.parent.iterdir()] == ["saved"]


def test_an_error_leaves_the_folder_as_it_was(folder):
    before = read(folder)
    with pytest.raises(RuntimeError), files.replaced_folder(folder) as staging:
        (staging / "ours").write_text("new")
        raise RuntimeError
    assert read(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["saved"]


def test_a_rename_that_fails_halfway_is_taken_back(folder, monkeypatch):
    before, rename, calls = read(folder), os.rename, []

    def fails(a, b):
        calls.append((a, b))
        if len(calls) == 2:
            raise OSError("refused")
        rename(a, b)

    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="refused"), files.replaced_folder(folder) as staging:
        (staging / "new").write_text("new")
    assert read(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["saved"]


def test_a_new_folder(tmp_path):
    with files.replaced_folder(tmp_path / "deep" / "new") as staging:
        (staging / "a").write_text("a")
    assert read(tmp_path) == {"deep/new/a": "a"}
