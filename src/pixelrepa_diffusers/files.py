"""Atomic writes of files and folders, and locks that keep two runs out of one folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


MANIFEST = "manifest.json"


class DamagedFolderError(ValueError):
    """A folder that is incomplete or altered."""


class FolderInUseError(RuntimeError):
    """Another run is writing to the folder."""


def write_atomically(path: Path, save: Callable[[Path], object]) -> None:
    """Call `save` with a temporary path beside `path`, then rename: an interrupted run leaves no half-written `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    try:
        save(temporary)
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # the operating system reports a full disk without a name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def write_folder(
    folder: Path,
    write: Callable[[Path], None],
    is_main: bool = True,
    barrier: Callable[[], None] = lambda: None,
    manifest: bool = False,
) -> None:
    """
    Write a folder atomically: call `write` with a temporary folder, sync it to disk and rename it into place.

    A kill or a power cut leaves the older folder of that name, if any, or the new one, both complete; the name is absent
    only between two renames. An error leaves no temporary folder. With several processes every one calls `write`, the main
    one creates and renames the folder, and `barrier` waits for all. `manifest` adds manifest.json, the checksums that
    [`verify_folder`] compares.

    Raises:
        OSError: If the disk is full; names the folder and the free space.
    """
    temporary = folder.with_name(f".{folder.name}.incomplete")
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    try:
        write(temporary)
    except Exception as error:
        # torch and safetensors raise errors of their own when the disk is full.
        free = shutil.disk_usage(temporary.parent).free / 2**20
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        if free > 1 and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"{folder} could not be written: the disk is full ({free:.0f} MiB free). Everything written before is "
            "intact: free space and run the command again."
        ) from error
    barrier()
    if is_main:
        if manifest:
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            fingerprints = {path.relative_to(temporary).as_posix(): _fingerprint(path) for path in files}
            write_json(temporary / MANIFEST, fingerprints)
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        older = _set_aside(folder) if folder.exists() else None
        os.replace(temporary, folder)
        _sync(folder.parent)
        if older is not None:
            shutil.rmtree(older)
    barrier()


def discard_folder(folder: Path) -> None:
    """Delete a folder after renaming it, so that a kill half-way leaves nothing that looks complete."""
    shutil.rmtree(_set_aside(folder))


def _set_aside(folder: Path) -> Path:
    """Rename a folder to a name that [`remove_incomplete`] deletes."""
    discarded = folder.with_name(f".{folder.name}.discarded")
    shutil.rmtree(discarded, ignore_errors=True)
    os.replace(folder, discarded)
    return discarded


def verify_folder(folder: Path) -> None:
    """
    Compare a folder with its manifest.json.

    Raises:
        DamagedFolderError: Names a file that is missing or altered.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).items()
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedFolderError(f"{folder} is not a complete checkpoint: {MANIFEST}: {error}.") from error

    def check(entry: tuple[str, dict]) -> None:
        name, fingerprint = entry
        path = folder / name
        if not path.is_file() or _fingerprint(path) != fingerprint:
            raise DamagedFolderError(f"{folder} is damaged: {name} is missing, cut off or altered.")

    with ThreadPoolExecutor() as pool:
        list(pool.map(check, manifest))


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """
    Create `folder`, lock it against other runs, and remove what a killed run left half-written in it.

    The lock file `.lock` stays; the operating system releases the lock of a killed process.

    Raises:
        FolderInUseError: If another run is writing to the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except (Timeout, FileNotFoundError):  # FileNotFoundError: another run has just removed its temporary folder
        raise FolderInUseError(f"Another run is writing to {folder}. Wait for it, or choose another folder.") from None
    with lock:
        remove_incomplete(folder)
        yield


def remove_incomplete(folder: Path) -> None:
    """Remove what killed runs left half-written or half-deleted in a folder that this run has locked."""
    for path in (*folder.glob(".*.incomplete"), *folder.glob(".*.discarded")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _fingerprint(path: Path) -> dict[str, int]:
    checksum, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
    return {"size": size, "crc32": checksum}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
