"""Folders that appear complete or not at all."""

import os

import pytest

from toprovar_jax import atomic_folder
from toprovar_jax.atomic_folder import check_target, write_folder
from toprovar_jax.errors import InputError

MARKER = "marker"


def write(target, content, overwrite=False):
    with write_folder(target, marker=MARKER, overwrite=overwrite) as folder:
        (folder / MARKER).write_text(content)
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text(content)


def content_of(target):
    assert sorted(path.name for path in target.rglob("*")) == ["deep", "file", MARKER]
    assert (target / "deep" / "file").read_text() == (target / MARKER).read_text()
    return (target / MARKER).read_text()


def test_missing_parents_are_made_and_nothing_else_is_left(tmp_path):
    write(tmp_path / "a" / "b", "new")
    assert content_of(tmp_path / "a" / "b") == "new"
    assert os.listdir(tmp_path / "a") == ["b"]


def test_nothing_is_left_of_a_failure(tmp_path):
    def fail():
        with write_folder(tmp_path / "out", marker=MARKER, overwrite=False) as folder:
            (folder / "half").write_text("")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(tmp_path) == []


def test_files_that_an_interrupted_writer_still_adds_go_too(tmp_path, monkeypatch):
    """Its threads add files between one attempt to remove the folder and the next."""
    late = ["first", "second", "third"]

    def write_late(_):
        if late:
            deep = tmp_path / ".out.partial" / "deep"
            deep.mkdir(parents=True)
            (deep / late.pop()).write_text("")

    monkeypatch.setattr(atomic_folder.time, "sleep", write_late)

    def fail():
        with write_folder(tmp_path / "out", marker=MARKER, overwrite=False) as folder:
            (folder / "early").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert late == []
    assert os.listdir(tmp_path) == []


def test_a_failure_keeps_the_old_folder(tmp_path):
    write(tmp_path / "out", "old")

    def fail():
        with write_folder(tmp_path / "out", marker=MARKER, overwrite=True) as folder:
            assert content_of(tmp_path / "out") == "old"
            (folder / MARKER).write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert content_of(tmp_path / "out") == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange_supported", [True, False])
def test_overwrite_replaces_the_old_folder(tmp_path, monkeypatch, exchange_supported):
    if not exchange_supported:
        monkeypatch.setattr(atomic_folder, "_exchange", lambda *_: False)
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new", overwrite=True)
    assert content_of(tmp_path / "out") == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_exchange_leaves_no_moment_without_target(tmp_path):
    """Where the system can exchange folders, the old one is in the other's place at once."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    if atomic_folder._exchange(tmp_path / "first", tmp_path / "second"):
        assert os.listdir(tmp_path / "first") == ["second"]
        assert os.listdir(tmp_path / "second") == ["first"]
    else:
        assert os.listdir(tmp_path / "first") == ["first"]


def test_a_link_keeps_pointing_to_the_replaced_folder(tmp_path):
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert content_of(tmp_path / "real") == "new"


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "new")
    assert content_of(tmp_path / "out") == "new"


def test_leftovers_of_a_killed_process_are_cleared(tmp_path):
    leftover = tmp_path / ".out.partial"
    (leftover / "folder").mkdir(parents=True)
    (leftover / "folder" / "file").write_text("")
    (leftover / "link").symlink_to(tmp_path)
    write(tmp_path / "out", "new")
    assert content_of(tmp_path / "out") == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_a_replacement_cut_between_its_renames_is_undone(tmp_path):
    write(tmp_path / "old", "old")
    (tmp_path / "old").rename(tmp_path / ".out.replaced")
    with pytest.raises(InputError, match="exists already"):
        write(tmp_path / "out", "new")
    assert content_of(tmp_path / "out") == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_replacement_cut_after_its_renames_is_completed(tmp_path):
    for name in ("old", "out"):
        write(tmp_path / name, name)
    (tmp_path / "old").rename(tmp_path / ".out.replaced")
    write(tmp_path / "out", "new", overwrite=True)
    assert content_of(tmp_path / "out") == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_a_second_writer_is_refused(tmp_path):
    with write_folder(tmp_path / "out", marker=MARKER, overwrite=False) as folder:
        (folder / MARKER).write_text("first")
        with pytest.raises(InputError, match=r"another process is writing .*out: wait until it has finished"):
            write(tmp_path / "out", "second")
    assert (tmp_path / "out" / MARKER).read_text() == "first"


def test_targets_that_must_not_be_replaced(tmp_path):
    write(tmp_path / "old", "old")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    (tmp_path / "file").write_text("")
    for name, overwrite, message in [
        ("old", False, "exists already: choose another folder or pass --overwrite"),
        ("photos", True, "holds other files and no marker: choose another folder"),
        ("file", True, "is a file, not a folder: choose another name"),
        ("file/below", False, "cannot write .*below: .*file is a file; choose another folder"),
        (".out.partial", False, "has an ending kept for unfinished folders: choose another name"),
    ]:
        with pytest.raises(InputError, match=message):
            check_target(tmp_path / name, marker=MARKER, overwrite=overwrite)
        with pytest.raises(InputError, match=message):
            write(tmp_path / name, "new", overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["file", "old", "photos"]
    assert content_of(tmp_path / "old") == "old"


def test_an_unwritable_place_is_noticed_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"no permission to write in .*; choose another folder"):
        check_target(tmp_path / "a" / "b", marker=MARKER, overwrite=False)
