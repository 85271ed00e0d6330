"""Files are whole or absent, and hashes tell apart what differs."""

import errno
import hashlib
import os
import tempfile

import pytest

from workbench import files
from workbench.errors import RunError
from workbench.files import canonical_json, check_writable, clear_disk_errors, digest, sha256_of, write_atomic


def test_a_digest_tells_where_one_part_ends_and_the_next_begins():
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("ab") != digest("ab", "")
    assert digest("") != digest()


def test_a_digest_is_sha256_of_each_part_after_its_length():
    raw = (2).to_bytes(8, "little") + b"ab" + (2).to_bytes(8, "little") + "é".encode()
    assert digest("ab", "é") == hashlib.sha256(raw).hexdigest()
    assert digest("ab", "é".encode()) == digest("ab", "é")


def test_a_file_is_hashed_by_its_content(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    # The test vector of FIPS 180-2.
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_json_of_equal_values_is_one_text():
    assert canonical_json({"b": 1, "a": [1.5, "é"]}) == canonical_json({"a": [1.5, "é"], "b": 1})
    assert canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}'


def test_a_written_file_holds_exactly_what_was_given(tmp_path):
    for content, raw in (("grüße\r\n", "grüße\r\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")):
        write_atomic(tmp_path / "new" / "folder" / "file", content)
        assert (tmp_path / "new" / "folder" / "file").read_bytes() == raw
    assert os.listdir(tmp_path / "new" / "folder") == ["file"]


def test_a_written_file_can_be_read_by_others(tmp_path):
    write_atomic(tmp_path / "file", "text")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


class Full:
    """An open file on a full disk: part of the content arrives, then an error."""

    def __init__(self, file):
        self._file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, raw):
        self._file.write(raw[: len(raw) // 2])
        self._file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


def _fault(monkeypatch, step):
    """Make one step of an atomic write fail as a full disk does."""

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    real = os.fdopen
    if step == "write":
        monkeypatch.setattr(files.os, "fdopen", lambda *arguments: Full(real(*arguments)))
    elif step == "mkstemp":
        monkeypatch.setattr(tempfile, "mkstemp", fail)
    else:
        monkeypatch.setattr(files.os, step, fail)


@pytest.mark.parametrize("step", ["mkstemp", "write", "fsync", "chmod", "replace"])
def test_a_fault_at_any_step_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    path.write_text("old")
    with monkeypatch.context() as patch:
        _fault(patch, step)
        with pytest.raises(RunError, match="the disk is full. Free some space"):
            write_atomic(path, "new content")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    write_atomic(path, "new content")  # and the next attempt works
    assert path.read_text() == "new content"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stop_while_writing_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, stop):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted(*_):
        raise stop

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(stop):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the quota is used up"),
        (errno.EFBIG, "file size limit"),
        (errno.EROFS, "read-only file system"),
        (errno.EACCES, "no permission"),
        (errno.EPERM, "no permission"),
    ],
)
def test_what_the_system_refuses_is_said_in_words_with_path_and_fix(tmp_path, code, words):
    with (
        pytest.raises(RunError, match=rf"cannot write .*thing: {words}.*--out"),
        clear_disk_errors(tmp_path / "thing"),
    ):
        raise OSError(code, os.strerror(code))


def test_an_error_that_is_not_about_the_disk_passes_as_it_is(tmp_path):
    with pytest.raises(ConnectionError), clear_disk_errors(tmp_path):
        raise ConnectionError(errno.ECONNRESET, "reset")


def test_a_folder_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="a file stands where a folder is needed"):
        check_writable(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused_in_words(tmp_path):
    with pytest.raises(RunError, match="cannot write /proc/workbench"):
        check_writable(files.Path("/proc/workbench/runs"))
    with pytest.raises(RunError, match="the name is too long"):
        check_writable(tmp_path / ("x" * 300))


def test_asking_whether_a_folder_can_be_written_leaves_no_trace(tmp_path):
    check_writable(tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []
