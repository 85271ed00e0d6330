"""WebDataset shards: what is paired, what is read, what is refused."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from workbench.datasets.images import decode
from workbench.datasets.shards import ShardPixels, ShardTexts, Tokens, open_shards
from workbench.errors import DataError


def picture(seed: int, size: int = 40, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, kind)
    return held.getvalue()


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            told = tarfile.TarInfo(name)
            told.size = len(content)
            shard.addfile(told, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Two shards, three pairs, and members that are none."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    here = tmp_path / "shards"
    here.mkdir()
    write_shard(
        here / "00000.tar",
        {
            "a.json": b"{}", "a.png": picture(0), "a.txt": b"a red fox",
            "alone.png": picture(9), "silent.txt": b"no picture",
            "b.txt": "ein Füchslein".encode(), "b.JPG": picture(1, kind="JPEG"),
        },
    )  # fmt: skip
    write_shard(here / "00001.tar", {"a.webp": picture(2, kind="WEBP"), "a.txt": b"  a kite \xff "})
    return here


def test_members_of_one_name_and_shard_are_a_pair(folder):
    shards = open_shards(folder)
    assert len(shards.table) == 3
    assert shards.table[:, 0].tolist() == [0, 0, 1]
    texts = ShardTexts(shards, 3)
    # What is no UTF-8 becomes the replacement character.
    assert list(texts) == ["a red fox", "ein Füchslein", "a kite �"]


def test_pictures_are_those_that_were_written_in_any_order_of_rows(folder):
    pixels = ShardPixels(open_shards(folder), 3, 32)
    expected = [decode(picture(0), 32, "a"), decode(picture(1, kind="JPEG"), 32, "b")]
    found = pixels[torch.tensor([1, 0, 1])]
    assert found.shape == (3, 3, 32, 32)
    assert torch.equal(found, torch.from_numpy(np.stack([expected[1], expected[0], expected[1]])))
    assert torch.equal(pixels[:2], torch.from_numpy(np.stack(expected)))


def test_tokens_are_made_for_the_rows_that_are_asked_for(folder):
    seen = []

    def tokenise(texts: list[str]) -> torch.Tensor:
        seen.append(texts)
        return torch.tensor([[len(text)] for text in texts])

    tokens = Tokens(ShardTexts(open_shards(folder), 3), tokenise)
    assert tokens[torch.tensor([1, 0])].tolist() == [[13], [9]]
    assert seen == [["ein Füchslein", "a red fox"]]
    assert len(tokens) == 3


def test_the_index_is_kept_until_a_shard_or_the_index_changes(folder, tmp_path, monkeypatch):
    first = open_shards(folder)
    monkeypatch.setattr(tarfile, "open", lambda *_: pytest.fail("indexed twice"))
    assert open_shards(folder).order == first.order
    monkeypatch.undo()
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    (index,) = (tmp_path / "cache" / "shards").iterdir()
    index.write_bytes(b"damaged")
    assert open_shards(folder).order == first.order
    write_shard(folder / "00002.tar", {"c.png": picture(3), "c.txt": b"new"})
    more = open_shards(folder)
    assert len(more.table) == 4
    assert more.order != first.order


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (None, "no .tar files in"),
        ({}, "no picture"),
        ({"a.png": b"1", "b.txt": b"2"}, "no picture"),
    ],
)
def test_folders_without_pairs_are_one_message(tmp_path, monkeypatch, members, message):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    if members is not None:
        write_shard(tmp_path / "0.tar", members)
    with pytest.raises(DataError, match=message):
        open_shards(tmp_path)


def test_a_shard_that_is_cut_short_or_no_tar_is_named(folder):
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[:700])
    with pytest.raises(DataError, match=r"shard 00001\.tar is damaged"):
        open_shards(folder)
    (folder / "00001.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(DataError, match=r"shard 00001\.tar is damaged"):
        open_shards(folder)


def test_one_damaged_picture_becomes_grey_and_is_told_of_and_many_are_refused(folder, caplog):
    write_shard(
        folder / "00002.tar",
        {"x.png": b"broken", "x.txt": b"x", "y.png": b"", "y.txt": b"y"},
    )
    pixels = ShardPixels(open_shards(folder), 5, 32)
    found = pixels[torch.tensor([0, 3])]
    assert (found[1] == 128).all()
    assert not (found[0] == 128).all()
    assert "1 of 2 pictures could not be read" in caplog.text
    with pytest.raises(DataError, match="2 of 3 pictures of the shards could not be read"):
        pixels[torch.tensor([4])]


def test_a_member_outside_the_folder_is_only_data(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    write_shard(tmp_path / "0.tar", {"../../evil.png": picture(0), "../../evil.txt": b"text"})
    assert list(ShardTexts(open_shards(tmp_path), 1)) == ["text"]
    assert not list(tmp_path.parent.glob("evil*"))
