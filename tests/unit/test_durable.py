"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import resource

import pytest

from progrpo.durable import append, new_folder, whole_folder, write_file, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def synced(monkeypatch):
    """The paths that were put on the disk, in order."""
    done, sync = [], os.fsync

    def fsync(handle):
        done.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return done


def test_a_text_is_replaced_in_one_step(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    write_text(file, "ä old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        write_text(file, "new")
    assert file.read_text(encoding="utf-8") == "ä old"
    write_text(file, "new")
    assert file.read_text(encoding="utf-8") == "new"
    assert names(tmp_path) == ["summary.json"]


def test_a_text_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, synced):
    done, replace = synced, os.replace

    def renamed(source, target):
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "replace", renamed)
    write_text(tmp_path / "a", "1")
    assert done == [str(tmp_path / f"a.{os.getpid()}.writing"), "rename", str(tmp_path)]


def test_two_writers_of_one_file_do_not_mix(tmp_path, monkeypatch):
    """As `progrpo report` and the run itself at its end: the one that renames last wins, and the file is whole."""
    file = tmp_path / "report.html"

    def slow(handle):
        handle.write(b"a" * 10)
        handle.flush()
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            write_text(file, "b" * 20)
        handle.write(b"a" * 10)

    write_file(file, slow)
    assert file.read_text() == "a" * 20 and names(tmp_path) == ["report.html"]


def test_a_full_disk_names_the_file_and_leaves_no_half(tmp_path):
    write_text(tmp_path / "a", "old")

    def refuse(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        write_file(tmp_path / "a", refuse)
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append(tmp_path / "/dev/full", b"x")


def test_a_disk_with_room_for_a_part_of_a_line_is_full(tmp_path):
    file = tmp_path / "m"
    append(file, b"x" * 50)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/m'"):
            append(file, b"y" * 50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_is_on_the_disk_when_it_is_appended(tmp_path, synced):
    append(tmp_path / "m", b"1")
    append(tmp_path / "m", b"2")
    assert (tmp_path / "m").read_bytes() == b"12"
    assert synced == [str(tmp_path / "m"), str(tmp_path), str(tmp_path / "m")]  # the folder once, for the new name


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "lora") as folder:
        (folder / "a").write_text("1")
        assert names(tmp_path) == ["lora.writing"]
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "lora") as folder:
        (folder / "b").write_text("2")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["lora"] and names(tmp_path / "lora") == ["a"]
    with new_folder(tmp_path / "lora") as folder:
        (folder / "b").write_text("2")
    assert names(tmp_path) == ["lora"] and names(tmp_path / "lora") == ["b"]


def test_the_folder_before_serves_until_the_new_one_is_there(tmp_path):
    with new_folder(tmp_path / "a") as folder:
        (folder / "old").touch()
    (tmp_path / "a").rename(tmp_path / "a.previous")
    assert whole_folder(tmp_path / "a") == tmp_path / "a.previous"
    with new_folder(tmp_path / "a"):
        assert whole_folder(tmp_path / "a") == tmp_path / "a.previous"
    assert whole_folder(tmp_path / "a") == tmp_path / "a" and names(tmp_path) == ["a"]
