"""The feature store: killed anywhere it goes on, damaged anywhere it notices; every row is a direction."""

import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import features, files
from workbench.errors import DataError, RunError
from workbench.features import Features, FeatureStore, Moments, check_features, check_same_rows

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=60, deadline=None, database=None)
ROWS, WIDTH, BLOCKS = 37, 6, 5  # four whole blocks and one of five rows


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 8)


def table(rows: int = ROWS, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))


class Counting:
    """An encoder that notes the first row of every block it is asked for, and can fail at one."""

    def __init__(self, content: torch.Tensor | None = None, fail_at: int | None = None):
        self.content = table() if content is None else content
        self.fail_at, self.seen = fail_at, []

    def __call__(self, rows: slice) -> torch.Tensor:
        self.seen.append(rows.start)
        if rows.start == self.fail_at:
            raise InterruptedError
        return self.content[rows]


def fill(folder: Path, compute: Callable, fingerprint: str = "weights", order: str = "rows") -> Features:
    return FeatureStore(folder).get("net", fingerprint, order, ROWS, compute)


def file_of(folder: Path, name: str = "features.npy") -> Path:
    (found,) = folder.rglob(name)
    return found


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


# --- killed from inside: run as a script, in processes of their own -----------------------------------------


def kill_here(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_compute(block: int) -> Callable[[slice], None]:
    return lambda rows: kill_here() if rows.start == block * features.BLOCK else None


def kill_in_block(block: int) -> Callable[[slice], None]:
    """Kill when half of a block's rows are in the file."""

    def half(table: Path, found: np.ndarray, start: int, rows: int) -> None:
        write(table, found[: len(found) // 2] if start == block * features.BLOCK else found, start, rows)
        if start == block * features.BLOCK:
            kill_here()

    write, features._write_block = features._write_block, half
    return lambda rows: None


def kill_before(name: str, count: int) -> Callable[[slice], None]:
    """Kill before the given time a file of that name is renamed into its place."""
    replace, left = os.replace, [count]

    def renamed(source: Path, target: Path) -> None:
        left[0] -= Path(target).name == name
        if not left[0]:
            kill_here()
        replace(source, target)

    os.replace = files.os.replace = renamed
    return lambda rows: None


KILLS = {
    "in the first block": (lambda: kill_in_compute(0), [0, 8, 16, 24, 32]),
    "in the third block": (lambda: kill_in_compute(2), [16, 24, 32]),
    "in the last block": (lambda: kill_in_compute(4), [32]),
    "while the third block is written": (lambda: kill_in_block(2), [16, 24, 32]),
    "while the first block is written": (lambda: kill_in_block(0), [0, 8, 16, 24, 32]),
    "before the second block is noted": (lambda: kill_before("blocks.json", 2), [8, 16, 24, 32]),
    "before the table gets its name": (lambda: kill_before("features.npy", 1), []),
    "before its hash is written": (lambda: kill_before("about.json", 1), []),
}


def in_process(work: Callable[[], None]) -> int:
    """Do something in a process of its own; return how it ended."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path) -> None:
    found = {}
    for name, (plan, _) in KILLS.items():

        def killed(name: str = name, plan: Callable = plan) -> None:
            each = plan()
            content = table()
            fill(folder / name, lambda rows: (each(rows), content[rows])[1])

        end, again = in_process(killed), Counting()
        fill(folder / name, again)
        raw = file_of(folder / name).read_bytes()
        left = sorted(path.name for path in file_of(folder / name).parent.iterdir())
        found[name] = [end, again.seen, hashlib.sha256(raw).hexdigest(), left]

    def slowly(rows: slice) -> torch.Tensor:
        (folder / "many" / f"{os.getpid()}-{rows.start}").touch()
        time.sleep(0.02)
        return table()[rows]

    (folder / "many").mkdir()
    children = []
    for _ in range(4):
        children.append(os.fork())
        if not children[-1]:
            code = 1
            try:
                code = int(not np.array_equal(fill(folder / "many", slowly).array, table().half().numpy()))
            finally:
                os._exit(code)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    calls = sorted(path.name.partition("-")[2] for path in (folder / "many").glob("*-*"))
    print(json.dumps({"kills": found, "many": [ends, calls]}))  # noqa: T201


if __name__ == "__main__":
    features.BLOCK = 8  # here as in the fixture below
    main(Path(sys.argv[1]))
    sys.exit()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """One interpreter that forks a process per attempt, so that torch is imported once."""
    done = subprocess.run(
        [sys.executable, __file__, tmp_path_factory.mktemp("stores")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(files.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_extraction_goes_on_after_its_last_block_and_ends_with_the_same_bytes(
    processes, tmp_path, kill
):
    fill(tmp_path, Counting())
    whole = hashlib.sha256(file_of(tmp_path).read_bytes()).hexdigest()
    end, computed_again, sha256, left = processes["kills"][kill]
    assert end == -signal.SIGKILL
    assert computed_again == KILLS[kill][1]
    assert sha256 == whole
    left = [name for name in left if not name.startswith(".")]  # a killed write leaves its temporary file
    assert left == ["about.json", "features.npy", "lock"]


def test_processes_that_want_the_same_features_compute_them_once(processes):
    ends, calls = processes["many"]
    assert ends == [0] * 4
    assert calls == sorted(str(start) for start in range(0, ROWS, 8))


# --- within one process -------------------------------------------------------------------------------------


def test_features_are_what_the_encoder_gave_in_16_bits_and_row_order(tmp_path):
    found = FeatureStore(tmp_path).get("net", "weights", "rows", ROWS, Counting(), parameters=7)
    assert (found.name, found.order, found.parameters, len(found), found.width) == (
        "net", "rows", 7, ROWS, WIDTH,
    )  # fmt: skip
    assert found.array.dtype == np.float16
    assert isinstance(found.array, np.memmap)
    assert np.array_equal(found.array, table().half().numpy())


def test_the_table_is_an_ordinary_numpy_file(tmp_path):
    fill(tmp_path, Counting())
    np.save(tmp_path / "expected.npy", table().half().numpy())
    assert file_of(tmp_path).read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_a_second_look_computes_nothing(tmp_path):
    first, second = Counting(), Counting()
    one = fill(tmp_path, first).array
    assert np.array_equal(fill(tmp_path, second).array, one)
    assert (len(first.seen), second.seen) == (BLOCKS, [])


@pytest.mark.parametrize(
    "change", [("other weights", "rows"), ("weights", "other rows"), ("weightsr", "ows")]
)
def test_another_fingerprint_or_order_is_another_table(tmp_path, change):
    fill(tmp_path, Counting())
    other, content = Counting(table() + 1), (table() + 1).half().numpy()
    assert np.array_equal(fill(tmp_path, other, *change).array, content)
    assert len(other.seen) == BLOCKS
    again = Counting()
    assert not np.array_equal(fill(tmp_path, again).array, content)
    assert again.seen == []


@pytest.mark.parametrize("block", range(BLOCKS))
def test_an_extraction_that_fails_in_a_block_goes_on_there(tmp_path, block):
    with pytest.raises(InterruptedError):
        fill(tmp_path, Counting(fail_at=8 * block))
    again = Counting()
    assert np.array_equal(fill(tmp_path, again).array, table().half().numpy())
    assert again.seen == list(range(8 * block, ROWS, 8))


def test_a_bad_block_is_not_kept_and_the_blocks_before_it_are(tmp_path):
    bad = table()
    bad[19, 2] = float("nan")
    with pytest.raises(DataError, match="net, row 19: the features are NaN, infinite"):
        fill(tmp_path, Counting(bad))
    again = Counting()
    fill(tmp_path, again)
    assert again.seen == [16, 24, 32]


@pytest.mark.parametrize("place", [0, 60, 127, 128, 128 + 12 * 20, -1])
def test_a_changed_byte_in_a_finished_table_is_noticed_and_all_is_computed_again(tmp_path, caplog, place):
    found = fill(tmp_path, Counting())
    found.moments(torch.arange(5))
    expected = file_of(tmp_path).read_bytes()
    del found
    flip(file_of(tmp_path), place)
    again = Counting()
    with caplog.at_level(logging.WARNING):
        fill(tmp_path, again)
    assert "features of net are damaged" in caplog.text
    assert len(again.seen) == BLOCKS
    assert file_of(tmp_path).read_bytes() == expected
    assert list(tmp_path.rglob("moments*")) == []  # they were of the damaged table, for all that is known


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("about.json", b""),
        ("about.json", b"\xff{}"),
        ("about.json", b"[]"),
        ("about.json", b'{"sha255": "0"}'),
        ("features.npy", None),
        ("features.npy", b""),
    ],
)
def test_a_finished_table_with_half_of_it_damaged_or_gone_is_computed_again(tmp_path, caplog, name, content):
    fill(tmp_path, Counting())
    path, again = file_of(tmp_path, name), Counting()
    path.unlink() if content is None else path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(fill(tmp_path, again).array, table().half().numpy())
    assert "features of net are damaged" in caplog.text
    assert len(again.seen) == BLOCKS


HEAD = 128  # bytes before the first row


@pytest.mark.parametrize(
    ("place", "block"),
    [(HEAD, 0), (HEAD + 96, 1), (HEAD + 2 * 96 - 1, 1), (HEAD + 3 * 96, 3), (HEAD + 400, 5)],
)
def test_a_changed_byte_in_a_done_block_is_noticed_and_computed_again(tmp_path, place, block):
    with pytest.raises(InterruptedError):
        fill(tmp_path, Counting(fail_at=32))
    partial = file_of(tmp_path, "features.partial.npy")
    if block == 5:  # beyond the blocks that are done: nothing to notice
        partial.write_bytes(partial.read_bytes() + b"\1" * 40)
        block = 4
    else:
        flip(partial, place)
    again = Counting()
    assert np.array_equal(fill(tmp_path, again).array, table().half().numpy())
    # A block is 8 rows of 6 numbers of 2 bytes, 96 bytes; all before the damaged one are kept.
    assert again.seen == list(range(8 * block, ROWS, 8))


@pytest.mark.parametrize("place", range(0, HEAD, 3))
def test_a_changed_byte_in_the_head_of_an_unfinished_table_starts_it_again(tmp_path, place):
    with pytest.raises(InterruptedError):
        fill(tmp_path, Counting(fail_at=32))
    flip(file_of(tmp_path, "features.partial.npy"), place)
    again = Counting()
    assert np.array_equal(fill(tmp_path, again).array, table().half().numpy())
    assert len(again.seen) == BLOCKS


@pytest.mark.parametrize(
    ("name", "content", "kept"),
    [
        ("blocks.json", b"", 0),
        ("blocks.json", b"[1, 2]", 0),
        ("blocks.json", b'{"width": null, "blocks": []}', 0),
        ("blocks.json", b'{"width": "6", "blocks": []}', 0),
        ("blocks.json", b'{"width": 6}', 0),
        ("blocks.json", None, 0),
        ("features.partial.npy", b"", 0),
        ("features.partial.npy", None, 0),
        ("features.partial.npy", 128 + 96 + 95, 1),
    ],
)
def test_what_is_damaged_or_gone_of_an_unfinished_table_is_computed_again(tmp_path, name, content, kept):
    with pytest.raises(InterruptedError):
        fill(tmp_path, Counting(fail_at=32))
    path, again = file_of(tmp_path, name), Counting()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    assert np.array_equal(fill(tmp_path, again).array, table().half().numpy())
    assert again.seen == list(range(8 * kept, ROWS, 8))


def test_more_notes_than_rows_do_no_harm(tmp_path):
    with pytest.raises(InterruptedError):
        fill(tmp_path, Counting(fail_at=32))
    notes = file_of(tmp_path, "blocks.json")
    noted = json.loads(notes.read_text())
    notes.write_text(json.dumps({**noted, "blocks": noted["blocks"] * 3}))
    again = Counting()
    assert np.array_equal(fill(tmp_path, again).array, table().half().numpy())
    assert again.seen == [32]


def test_a_full_disk_is_one_message_and_the_extraction_goes_on_once_there_is_space(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def seek(self, place):
            self.file.seek(place)

        def write(self, raw):
            self.file.write(raw[:50])
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, mode):
        return Full(open(path, mode)) if mode == "r+b" and len(compute.seen) == 3 else open(path, mode)

    compute = Counting()
    with monkeypatch.context() as patch:
        patch.setattr(features, "open", opened, raising=False)
        with pytest.raises(RunError, match="features.partial.npy: the disk is full"):
            fill(tmp_path, compute)
    again = Counting()
    assert np.array_equal(fill(tmp_path, again).array, table().half().numpy())
    assert again.seen == [16, 24, 32]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda rows: table()[rows][:1],
            r"net: features of shape \(1, 6\) for rows 0 to 7; expected one row",
        ),
        (lambda rows: table()[rows][:, : 6 - (rows.start > 0)], r"\(8, 5\) for rows 8 to 15.*the width 6"),
        (lambda rows: table()[rows][:, : 1 if rows.start else 6], r"\(8, 1\) for rows 8 to 15"),
        (lambda rows: table()[rows][:, 0], r"net: features are float16 of shape \(8,\)"),
    ],
)
def test_an_encoder_that_gives_another_shape_than_asked_for_is_refused(tmp_path, answer, message):
    with pytest.raises(DataError, match=message):
        fill(tmp_path, answer)


def test_an_encoder_whose_width_changed_between_two_processes_is_refused(tmp_path):
    with pytest.raises(InterruptedError):
        fill(tmp_path, Counting(fail_at=32))
    with pytest.raises(DataError, match=r"\(5, 3\) for rows 32 to 36.*the width 6"):
        fill(tmp_path, Counting(table()[:, :3]))


def test_a_table_without_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="net: there are no rows"):
        FeatureStore(tmp_path).get("net", "weights", "rows", 0, Counting())


def test_a_table_of_one_row_is_a_table(tmp_path):
    assert FeatureStore(tmp_path).get("net", "weights", "rows", 1, Counting()).array.shape == (1, WIDTH)


# --- what is refused ----------------------------------------------------------------------------------------

ODD = "NaN, infinite, or above 65,504"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (0.0, "all zeros"),
        (1e-9, "all zeros in 16 bits"),  # half of the smallest 16-bit number is 3e-8
        (float("nan"), ODD),
        (float("inf"), ODD),
        (-float("inf"), ODD),
        (65_520.0, ODD),  # rounds up; 65,519 rounds down to 65,504
        (-1e30, ODD),
    ],
)
def test_a_row_without_a_direction_is_refused_by_its_number(value, kind):
    content = np.ones((6, 3), np.float32)
    content[4] = value
    content[5] = value
    with pytest.raises(DataError, match=f"net, row 104: the features are {kind}.*; 2 such rows"):
        check_features(content, "net", first=100)
    check_features(content[:4], "net")


def test_one_bad_number_makes_a_row_bad_and_one_good_number_makes_it_good():
    content = np.zeros((2, 3), np.float16)
    content[:, 1] = 65_504
    check_features(content, "net")
    content[1, 2] = np.nan
    with pytest.raises(DataError, match="net, row 1: .*; 1 such rows"):
        check_features(content, "net")


@pytest.mark.parametrize(
    "content",
    [
        np.ones((3, 2), np.int64),
        np.ones(3),
        np.ones((2, 2, 2)),
        np.array([["a", "b"]]),
        np.ones((2, 2), complex),
    ],
)
def test_what_is_no_table_of_floating_point_numbers_is_refused(content):
    with pytest.raises(DataError, match=r"net: features are .* give floating point \(rows, dim\)"):
        check_features(content, "net")


def some(name: str, rows: int = 4, order: str = "as given") -> Features:
    return Features(name, table(rows).numpy(), order)


def test_encoders_of_unequal_rows_are_named_with_both_numbers():
    with pytest.raises(DataError, match="one has 4 rows and three has 5; .* one row for the same item"):
        check_same_rows([some("one"), some("two"), some("three", 5)])


def test_encoders_of_another_order_are_named():
    with pytest.raises(DataError, match="rows of one and two are in different order; sort both by one id"):
        check_same_rows([some("one"), some("two", order="other")])


def test_encoders_of_the_same_rows_pass():
    check_same_rows([])
    check_same_rows([some("one"), some("two")])


# --- unit rows and moments ----------------------------------------------------------------------------------


def test_unit_rows_by_hand():
    found = Features("net", np.array([[3, 4], [0, -2], [5, 12]], np.float16), "rows")
    # 3, 4, 5 and 5, 12, 13
    unit = found.unit(torch.tensor([2, 0, 1, 0]))
    expected = torch.tensor([[5 / 13, 12 / 13], [0.6, 0.8], [0.0, -1.0], [0.6, 0.8]])
    torch.testing.assert_close(unit, expected)
    assert unit.dtype == torch.float32


def test_rows_are_the_same_whether_all_are_held_or_each_is_read(monkeypatch):
    rows, found = torch.tensor([5, 0, 5]), []
    # 37 rows of 6 numbers of 4 bytes in single precision: 888 bytes.
    for held in (888, 887):
        monkeypatch.setattr(features, "HELD_BYTES", held)
        one = some("net", ROWS)
        found.append((one.unit(rows), one.moments(rows).covariance, one._units is None))
    assert [unheld for *_, unheld in found] == [False, True]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    found[0][0].zero_()  # a caller's own copy
    assert torch.equal(one.unit(rows), found[1][0])


@pytest.mark.parametrize("size", [1e-4, 1.0, 60_000.0])
def test_unit_rows_have_norm_one_at_any_size_that_is_let_in(size):
    content = (size * np.eye(4, 7)).astype(np.float16)
    check_features(content, "net")
    norms = Features("net", content, "rows").unit(torch.arange(4)).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(4))


def test_moments_by_hand():
    found = Features("net", np.array([[2, 0], [0, 3], [1, 0], [9, 9]], np.float16), "rows")
    moments = found.moments(torch.tensor([0, 1, 2]))
    # Unit rows (1, 0), (0, 1), (1, 0). Mean (2/3, 1/3); second moments diag(2/3, 1/3) less the outer product
    # of the mean: 2/3 - 4/9 = 2/9, 0 - 2/9, 1/3 - 1/9 = 2/9.
    torch.testing.assert_close(moments.mean, torch.tensor([2 / 3, 1 / 3], dtype=torch.double))
    expected = torch.tensor([[2 / 9, -2 / 9], [-2 / 9, 2 / 9]], dtype=torch.double)
    torch.testing.assert_close(moments.covariance, expected)
    assert moments.count == 3


@quick
@given(rows=st.integers(1, 40), width=st.integers(1, 9), seed=st.integers(0, 10**6), shift=st.floats(-3, 3))
def test_moments_are_numpys(rows, width, seed, shift):
    rng = np.random.default_rng(seed)
    content = (rng.standard_normal((40, width)) + shift).astype(np.float16)
    content[:, 0] += np.float16(0.1) * (content == 0).all(1)
    chosen = rng.permutation(40)[:rows]
    moments = Features("net", content, "rows").moments(torch.from_numpy(chosen))
    unit = content[chosen].astype(float)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    # Products are taken in single precision.
    np.testing.assert_allclose(moments.mean, unit.mean(0), atol=1e-6)
    np.testing.assert_allclose(
        moments.covariance, np.cov(unit, rowvar=False, bias=True).reshape(width, width), atol=1e-6
    )
    assert moments.count == rows


def test_many_rows_lose_nothing():
    # 10,000 rows that hardly differ, in three parts: variances of 1e-6 beside a mean of 1.
    rng = np.random.default_rng(0)
    content = np.concatenate([np.ones((10_000, 1)), 1e-3 * rng.standard_normal((10_000, 2))], 1)
    found = Features("net", content.astype(np.float16), "rows").moments(torch.arange(10_000))
    unit = content.astype(np.float16).astype(float)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    expected = np.cov(unit, rowvar=False, bias=True)
    # Single precision of products up to 1e-6, but not of sums: 1 % of the variance.
    np.testing.assert_allclose(found.covariance[1:, 1:], expected[1:, 1:], atol=1e-8)


def test_moments_are_kept_by_the_set_of_rows(tmp_path, monkeypatch):
    found = fill(tmp_path, Counting())
    rows, calls = torch.arange(20), []
    unit = Features.unit
    monkeypatch.setattr(Features, "unit", lambda self, part: calls.append(len(part)) or unit(self, part))
    first = found.moments(rows)
    again = fill(tmp_path, Counting()).moments(rows)
    assert calls == [20]
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.covariance, again.covariance)
    assert again.count == 20
    other = found.moments(rows[:19])
    assert calls == [20, 19]
    assert not torch.equal(first.mean, other.mean)


@pytest.mark.parametrize("damage", ["first", "last", "empty"])
def test_damaged_moments_are_noticed_and_computed_again(tmp_path, caplog, damage):
    found = fill(tmp_path, Counting())
    first = found.moments(torch.arange(20))
    (path,) = tmp_path.rglob("moments-*")
    path.write_bytes(b"") if damage == "empty" else flip(path, {"first": 0, "last": -1}[damage])
    with caplog.at_level(logging.WARNING):  # opened anew each time: what was read once is held
        again = fill(tmp_path, Counting()).moments(torch.arange(20))
    assert f"{path.name} is damaged" in caplog.text
    assert torch.equal(first.covariance, again.covariance)
    caplog.clear()
    fill(tmp_path, Counting()).moments(torch.arange(20))
    assert caplog.text == ""


def test_moments_of_features_outside_the_store_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(some("net").moments(torch.arange(4)), Moments)
    assert list(tmp_path.iterdir()) == []
