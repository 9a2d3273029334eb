"""Atomic files and folders, checksums and locks."""

import errno
import os
import shutil

import pytest
from training_runs import ended, fork

from pixelrepa_diffusers.files import (
    DamagedFolderError,
    FolderInUseError,
    only_writer,
    verify_folder,
    write_atomically,
    write_folder,
)


def write(content: bytes):
    return lambda folder: (folder / "file").write_bytes(content)


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_folder_replaces_the_older_one(tmp_path):
    write_folder(tmp_path / "out", write(b"old"))
    write_folder(tmp_path / "out", write(b"new"))
    assert (tmp_path / "out/file").read_bytes() == b"new" and visible(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "out could not be written: the disk is full"),
        (RuntimeError("a mistake"), RuntimeError, "^a mistake$"),
    ],
)
def test_failed_write_keeps_the_older_folder(tmp_path, error, raised, message):
    def fail(folder):
        (folder / "file").write_bytes(b"half")
        raise error

    write_folder(tmp_path / "out", write(b"old"))
    with pytest.raises(raised, match=message):
        write_folder(tmp_path / "out", fail)
    assert (tmp_path / "out/file").read_bytes() == b"old" and visible(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["file", "manifest.json"])
@pytest.mark.parametrize("content", [b"conten", b"Content", b"[1]", None], ids=str)
def test_damaged_folder_is_detected(tmp_path, name, content):
    write_folder(tmp_path / "out", write(b"content"), manifest=True)
    verify_folder(tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    if content is not None:
        (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(DamagedFolderError, match=name):
        verify_folder(tmp_path / "out")


def test_second_writer_is_refused(tmp_path):
    folder = tmp_path / "out"

    def write_second():
        with pytest.raises(FolderInUseError, match=f"Another run is writing to {folder}"), only_writer(folder):
            pass

    with only_writer(folder):
        (folder / ".half.incomplete").touch()
        assert ended(fork(write_second, tmp_path / "log"), 60) == 0, (tmp_path / "log").read_text()
        assert visible(folder) == [".half.incomplete"]


def test_killed_writer_leaves_a_folder_that_the_next_one_cleans(tmp_path):
    folder = tmp_path / "out"

    def write_and_die():
        with only_writer(folder):
            write_atomically(folder / "a.png", lambda path: (path.write_bytes(b"half"), os.kill(os.getpid(), 9)))

    assert ended(fork(write_and_die, tmp_path / "log"), 60) == -9
    assert [path.endswith(".incomplete") for path in visible(folder)] == [True]
    with only_writer(folder):
        assert visible(folder) == []


def test_writers_that_come_and_go_do_not_touch_each_others_files(tmp_path):
    folder = tmp_path / "out"

    def write_often():
        for _ in range(50):
            try:
                with only_writer(folder):
                    write_folder(folder / "result", write(b"whole"))
                    assert visible(folder) == ["result"]
                    shutil.rmtree(folder / "result")
            except FolderInUseError:
                pass

    logs = [tmp_path / f"log{number}" for number in range(3)]
    statuses = [ended(child, 120) for child in [fork(write_often, log) for log in logs]]
    assert statuses == [0, 0, 0], [log.read_text()[-1000:] for log in logs]
