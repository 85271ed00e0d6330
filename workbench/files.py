"""Files that are either whole or absent: hashes, atomic writes and folders published by rename."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workbench.errors import RunError

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "file size limit",
}
_CLOSED = {
    errno.EROFS: "read-only file system",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EEXIST: "a file stands where a folder is needed",
    errno.ENOENT: "the folder is gone or cannot be made",
    errno.ENAMETOOLONG: "the name is too long",
}


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in blocks so that size does not matter."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*parts: str | bytes) -> str:
    """Hash parts with their lengths, so that ("ab", "c") and ("a", "bc") differ."""
    total = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8") if isinstance(part, str) else part
        total.update(len(raw).to_bytes(8, "little"))
        total.update(raw)
    return total.hexdigest()


def canonical_json(value: object) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8 kept."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn "disk full" and "read-only" into one message that names the folder and the fix.

    Raises:
        RunError: the operating system refused the write.
    """
    try:
        yield
    except OSError as error:
        reason = _FULL.get(error.errno or 0)
        if reason:
            raise RunError(
                f"cannot write {path}: {reason}. Free some space or choose another place with --out; "
                "finished steps are kept and the same command goes on from there."
            ) from error
        reason = _CLOSED.get(error.errno or 0)
        if reason:
            raise RunError(
                f"cannot write {path}: {reason}. Choose a folder you can write to with --out."
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        RunError: the disk is full or the folder cannot be written; the old file is intact.
    """
    raw = content.encode("utf-8") if isinstance(content, str) else content
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def check_writable(folder: Path) -> None:
    """Fail before any computing starts if a folder cannot be written.

    Raises:
        RunError: the folder cannot be made or written.
    """
    write_atomic(folder / ".writable", "")
    (folder / ".writable").unlink(missing_ok=True)
