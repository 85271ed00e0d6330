"""Image sets: what is read, how a picture becomes a square, and what is refused in words."""

import struct
import subprocess
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from pydantic import ValidationError

from workbench.datasets import images
from workbench.datasets.images import ImageData, ImageTable, decode, group_column, images_in, read_images
from workbench.errors import DataError

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=100, deadline=None, database=None)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of a picture in some format."""
    stream = BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def plain(colour, mode: str = "RGB", side: int = 8) -> Image.Image:
    return Image.new(mode, (side, side), colour)


def noisy(width: int, height: int, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def header_only(width: int, height: int) -> bytes:
    """A 1-bit PNG that says how large it is and holds almost nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    size = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", size), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def colour_of(raw: bytes) -> tuple[int, ...]:
    """The one colour of a picture."""
    pixels = decode(raw, 8, "it")
    assert (pixels == pixels[:, :1, :1]).all()
    return tuple(pixels[:, 0, 0].tolist())


# --- one picture: modes -------------------------------------------------------------------------------------


def palette(colour: int, **options) -> bytes:
    picture = plain(colour, "P")
    picture.putpalette([*RED, *GREEN, *BLUE])
    return encoded(picture, **options)


@pytest.mark.parametrize(
    ("raw", "colour"),
    [
        (encoded(plain((1, 2, 3))), (1, 2, 3)),
        (encoded(plain(100, "L")), (100, 100, 100)),
        (encoded(plain(1, "1")), WHITE),
        (palette(2), BLUE),
        # (1 - cyan) (1 - black) and so on: no red light is kept back, all green and blue is.
        (encoded(plain((0, 255, 255, 0), "CMYK"), "TIFF"), RED),
        (encoded(plain((0, 0, 0, 55), "CMYK"), "TIFF"), (200, 200, 200)),
        # 257 = 65535 / 255, so 25700 is 100; 25828 is 100.498 and 25829 is 100.502.
        *(
            (encoded(Image.fromarray(np.full((8, 8), level, np.uint16)), kind), (grey,) * 3)
            for kind in ("PNG", "TIFF")
            for level, grey in ((25700, 100), (25828, 100), (25829, 101), (65535, 255))
        ),
        (b"P5 1 1 65535\n" + struct.pack(">H", 25700), (100, 100, 100)),
    ],
)
def test_every_mode_becomes_rgb(raw, colour):
    assert colour_of(raw) == colour


@pytest.mark.parametrize(
    ("raw", "colour"),
    [
        # Over white: 255 * (1 - 128 / 255) = 127 of what the colour itself does not give.
        (encoded(plain((*RED, 128), "RGBA")), (255, 127, 127)),
        (encoded(plain((*RED, 0), "RGBA")), WHITE),
        (encoded(plain((*RED, 255), "RGBA")), RED),
        (encoded(plain((0, 128), "LA")), (127, 127, 127)),
        (encoded(plain((*RED, 128), "RGBA"), "WEBP", lossless=True), (255, 127, 127)),
        (palette(0, transparency=bytes([128, 255])), (255, 127, 127)),
        (palette(1, transparency=bytes([128, 255])), GREEN),
        (palette(0, transparency=0), WHITE),
        (encoded(plain(RED), transparency=RED), WHITE),
        (encoded(plain(RED), transparency=BLUE), RED),
        (encoded(plain(7, "L"), transparency=7), WHITE),
    ],
)
def test_alpha_is_laid_over_white(raw, colour):
    assert colour_of(raw) == colour


def test_hidden_colours_do_not_shine_through_when_resized():
    # Left half invisible red, right half opaque blue: shrunk to 8, no pixel has red without as much green.
    picture = Image.new("RGBA", (64, 64), (*RED, 0))
    picture.paste((*BLUE, 255), (33, 0, 64, 64))
    red, green, _ = decode(encoded(picture), 8, "it")
    assert (red == green).all()
    assert set(red[:, 0]) == {255}
    assert set(red[:, 7]) == {0}


def test_pixels_of_32_bits_are_refused_because_their_range_is_a_guess():
    for mode, level in (("F", 0.5), ("I", 70_000)):
        with pytest.raises(DataError, match="it: 32-bit pixels, .*; save the image with 8 or 16 bits"):
            decode(encoded(plain(level, mode), "TIFF"), 8, "it")


# --- one picture: orientation, size, crop -------------------------------------------------------------------


def quarters(top_left: int, top_right: int, bottom_left: int, bottom_right: int) -> Image.Image:
    """A grey picture of four flat quarters."""
    levels = np.array([[top_left, top_right], [bottom_left, bottom_right]], np.uint8)
    return Image.fromarray(levels.repeat(8, 0).repeat(8, 1)).convert("RGB")


def corners(pixels: np.ndarray) -> list[list[int]]:
    return pixels[0][np.ix_([0, -1], [0, -1])].tolist()


@pytest.mark.parametrize(
    ("orientation", "shown"),
    # Stored as 10 20 / 30 40. The standard says where the stored first row and first column belong.
    [
        (1, [[10, 20], [30, 40]]),  # top, left
        (2, [[20, 10], [40, 30]]),  # top, right
        (3, [[40, 30], [20, 10]]),  # bottom, right
        (4, [[30, 40], [10, 20]]),  # bottom, left
        (5, [[10, 30], [20, 40]]),  # left, top
        (6, [[30, 10], [40, 20]]),  # right, top
        (7, [[40, 20], [30, 10]]),  # right, bottom
        (8, [[20, 40], [10, 30]]),  # left, bottom
        (0, [[10, 20], [30, 40]]),  # no such orientation
        (99, [[10, 20], [30, 40]]),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_exif_orientation_is_honoured(orientation, shown, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    raw = encoded(quarters(10, 20, 30, 40), kind, exif=exif, **options)
    assert abs(np.array(corners(decode(raw, 16, "it"))) - shown).max() <= (2 if kind == "JPEG" else 0)


def test_an_oblong_picture_is_turned_before_it_is_cropped():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (32, 16), GREEN)
    picture.paste(RED, (0, 0, 8, 16))  # the left end, after turning the upper one: cut off
    pixels = decode(encoded(picture, exif=exif), 16, "it")
    assert (pixels == np.array(GREEN)[:, None, None]).all()


@pytest.mark.parametrize(
    "damage", [(b"MM\0*", b"XX\0*"), (b"MM\0*\0\0\0\x08\0\x01", b"MM\0*\0\0\0\x08\xff\x01")]
)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_damaged_exif_data_do_not_spoil_a_picture(kind, damage):
    exif = Image.Exif()
    exif[0x0112] = 1
    raw = encoded(plain(BLUE), kind, exif=exif)
    assert damage[0] in raw
    red, _, blue = decode(raw.replace(*damage), 8, "it")
    assert red.max() < 10
    assert blue.min() > 240


@pytest.mark.parametrize("turned", [False, True])
def test_the_centre_is_cut_out(turned):
    # 32 by 16: of columns 0 to 31 the middle 16, 8 to 23, are kept; nothing is resized at side 16.
    picture = Image.new("RGB", (32, 16), GREEN)
    picture.paste(RED, (0, 0, 8, 16))
    picture.paste(BLUE, (24, 0, 32, 16))
    if turned:
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
    pixels = decode(encoded(picture), 16, "it")
    assert (pixels == np.array(GREEN)[:, None, None]).all()
    # At side 8 the kept part is the same, so no red and no blue is further in than the filter reaches.
    small = decode(encoded(picture), 8, "it")
    assert (small[:, 2:-2, 2:-2] == np.array(GREEN)[:, None, None]).all()


def test_a_square_of_the_right_side_keeps_its_pixels():
    picture = noisy(16, 16)
    pixels = decode(encoded(picture), 16, "it")
    assert (pixels == np.asarray(picture).transpose(2, 0, 1)).all()
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize("seed", range(25))
def test_squares_are_those_of_clips_preprocessing(seed):
    from torchvision import transforms

    width, height, size = np.random.default_rng(seed).integers((4, 4, 8), (200, 200, 100)).tolist()
    picture = noisy(width, height, seed)
    bicubic = transforms.InterpolationMode.BICUBIC
    clip = transforms.Compose([transforms.Resize(size, bicubic), transforms.CenterCrop(size)])
    expected = np.asarray(clip(picture)).transpose(2, 0, 1)
    assert (decode(encoded(picture), size, "it") == expected).all()


@quick
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(8, 96),
    st.tuples(*[st.integers(0, 255)] * 3),
    st.sampled_from(["PNG", "BMP", "PPM", "TIFF"]),
)
def test_any_size_becomes_the_square_and_one_colour_stays_that_colour(width, height, size, colour, kind):
    raw = encoded(Image.new("RGB", (width, height), colour), kind)
    pixels = decode(raw, size, "it")
    assert pixels.shape == (3, size, size)
    assert pixels.dtype == np.uint8
    assert (pixels == np.array(colour)[:, None, None]).all()


@pytest.mark.parametrize("shape", [(1, 1_000_000), (1_000_000, 1), (3, 50_000)])
def test_a_very_long_picture_shows_its_middle_and_does_not_fill_the_memory(shape):
    # Resized whole, one by a million pixels would have 512 by 512 million.
    picture = Image.new("L", shape, 255)
    width, height = shape
    picture.paste(90, (width * 2 // 5, height * 2 // 5, -(-width * 3 // 5), -(-height * 3 // 5)))
    pixels = decode(encoded(picture), 512, "it")
    assert pixels.shape == (3, 512, 512)
    assert set(np.unique(pixels)) <= {90} if 1 in shape else (pixels[:, 256, 256] == 90).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_picture_is_read(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    raw = encoded(plain(RED), kind, save_all=True, append_images=[plain(GREEN), plain(BLUE)], **options)
    assert Image.open(BytesIO(raw)).n_frames == 3
    assert colour_of(raw) == RED


# --- one picture: what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "it: empty, 0 bytes; copy the image again or remove the row"),
        (
            b"sentence1,sentence2\n",
            "it: not an image, or damaged; readable are JPEG, PNG, WEBP, GIF, BMP, TIFF, P",
        ),
        (b"<svg xmlns='...'/>", "it: not an image, or damaged; readable are "),
        (header_only(0, 0), "it: not an image"),
        (header_only(0, 9), "it: not an image"),
        (b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + b";", "it: not an image"),
        (b"P6 0 0 255\n", "it: not an image"),
        (header_only(9, 9), "it: cut short or damaged .image file is truncated.*; copy the image again"),
        (encoded(noisy(90, 90), "JPEG")[:3000], "it: cut short or damaged .image file is truncated"),
        (encoded(noisy(90, 90), "JPEG")[:20], "it: (cut short|not an image)"),
        (encoded(noisy(90, 90), "PNG")[:3000], "it: cut short or damaged"),
        (encoded(noisy(90, 90), "WEBP")[:3000], "it: cut short or damaged"),
        (encoded(noisy(90, 90), "GIF")[:3000], "it: cut short or damaged"),
        (encoded(noisy(90, 90), "TIFF")[:3000], "it: cut short or damaged"),
        (encoded(noisy(90, 90), "BMP")[:3000], "it: cut short or damaged"),
        (encoded(noisy(90, 90), "PPM")[:3000], "it: cut short or damaged"),
    ],
)
def test_what_cannot_be_decoded_is_refused_in_one_line(raw, message):
    with pytest.raises(DataError, match=f"^{message}") as caught:
        decode(raw, 8, "it")
    assert len(str(caught.value).splitlines()) == 1
    assert "BytesIO" not in str(caught.value)


@pytest.mark.parametrize(
    ("width", "height", "said"),
    [
        (30_000, 30_000, ""),  # Pillow itself refuses it
        (10_000, 10_000, "10000 x 10000, "),  # Pillow would warn
        (8_000, 8_001, "8000 x 8001, "),  # Pillow would read it
    ],
)
def test_a_picture_of_more_than_64_million_pixels_is_refused_before_it_is_decoded(
    monkeypatch, width, height, said
):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(
        DataError, match=f"^it: {said}more than 64 million pixels; reduce the image or remove"
    ):
        decode(header_only(width, height), 8, "it")


def test_a_picture_of_just_as_many_pixels_as_allowed_is_read(monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS", 72)
    assert colour_of(encoded(Image.new("1", (8, 9), 1))) == WHITE
    with pytest.raises(DataError, match="it: 8 x 10, more than"):
        decode(encoded(Image.new("1", (8, 10), 1)), 8, "it")


def test_formats_for_which_pillow_starts_another_program_are_not_opened(monkeypatch):
    eps = encoded(plain(RED), "EPS")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    with pytest.raises(DataError, match="it: not an image, or damaged; readable are JPEG"):
        decode(eps, 8, "it")


@quick
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]),
    st.floats(0, 1),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=4),
)
def test_damage_gives_a_square_or_a_clear_error_and_nothing_else(kind, kept, changes):
    raw = bytearray(encoded(noisy(24, 17), kind))
    for place, value in changes:
        raw[int(place * len(raw))] = value
    try:
        found = decode(bytes(raw[: int(kept * len(raw))]), 16, "it").shape
    except DataError as problem:
        found = str(problem)[:4]
    assert found in ((3, 16, 16), "it: ")


def test_no_warning_of_pillow_leaks_and_the_filters_stay():
    exif = Image.Exif()
    exif[0x0112] = 1
    loud = encoded(plain(BLUE), "JPEG", exif=exif).replace(
        b"MM\0*\0\0\0\x08\0\x01", b"MM\0*\0\0\0\x08\xff\x01"
    )
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        Image.open(BytesIO(loud)).getexif().get(0)  # what Pillow does by itself
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        decode(loud, 8, "it")
        images_in([loud] * 4, 8, ["it"] * 4)
        with pytest.raises(DataError):
            decode(header_only(10_000, 10_000), 8, "it")
        assert list(warnings.filters) == before
    assert caught == []


def test_the_filters_stay_when_several_threads_decode_at_once():
    before = list(warnings.filters)
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        raw = encoded(noisy(40, 40, seed))
        start.wait()
        for _ in range(20):
            decode(raw, 16, "it")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert list(warnings.filters) == before


# --- many pictures ------------------------------------------------------------------------------------------


def test_many_pictures_keep_their_order():
    greys = np.random.default_rng(0).integers(0, 256, 300).tolist()
    pixels = images_in([encoded(plain(grey, "L")) for grey in greys], 8, [""] * 300)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (300, 3, 8, 8)
    assert pixels[:, 0, 3, 3].tolist() == greys


def test_of_several_bad_pictures_the_first_in_order_is_named():
    # The first of the bad ones takes long, so that later ones fail earlier.
    slow = encoded(noisy(900, 900), "PNG")[:-60_000]
    contents = [encoded(plain(RED)), slow, b"", b"no"]
    for _ in range(5):
        with pytest.raises(DataError, match="^row 1: cut short or damaged"):
            images_in(contents, 8, [f"row {row}" for row in range(4)])


def test_no_pictures_are_no_problem():
    assert images_in([], 16, []).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(("count", "shown"), [(2000, False), (2001, True)])
def test_progress_is_shown_for_more_than_2000_pictures(monkeypatch, capsys, count, shown):
    images_in([encoded(plain(RED, side=1))] * count, 8, [""] * count)
    assert ("reading images" in capsys.readouterr().err) == shown


# --- a table of the user's own ------------------------------------------------------------------------------

PICTURES = {"a.png": RED, "sub/b.png": GREEN, "c.png": BLUE}


def own(folder: Path, rows: list[dict] | None = None, ending: str = "csv", **changed) -> Path:
    """Write three pictures and a table of them; changed columns replace or join those of the rows."""
    (folder / "sub").mkdir(exist_ok=True)
    for name, colour in PICTURES.items():
        plain(colour).save(folder / name)
    if rows is None:
        rows = [
            {"image": name, "label": label, "region": region, "income": income}
            for name, label, region, income in zip(
                PICTURES, ("stove", "door", "stove"), ("Asia", "Europe", "Asia"), (26.5, 400, 90), strict=True
            )
        ]
    table = pl.DataFrame(rows, infer_schema_length=None, strict=False).with_columns(
        pl.Series(name, values, strict=False) for name, values in changed.items()
    )
    path = folder / f"index.{ending}"
    table.write_csv(path) if ending == "csv" else table.write_parquet(path)
    return path


def read(path: Path, split: str | None = None, **options) -> ImageTable:
    return read_images(ImageData(source="files", name="own", path=str(path), size=8, **options), split)


def colours(table: ImageTable) -> list[tuple[int, ...]]:
    assert (table.pixels == table.pixels[:, :, :1, :1]).all()
    return [tuple(one) for one in table.pixels[:, :, 0, 0].tolist()]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_pictures_are_found_relative_to_the_table(tmp_path, ending, monkeypatch):
    path = own(tmp_path, ending=ending)
    monkeypatch.chdir(tmp_path.parent)
    found = read(path)
    assert len(found) == 3
    assert colours(found) == [RED, GREEN, BLUE]
    assert found.about.to_dicts() == [
        {"label": "stove", "region": "Asia", "income": 26.5, "file": "a.png"},
        {"label": "door", "region": "Europe", "income": 400, "file": "sub/b.png"},
        {"label": "stove", "region": "Asia", "income": 90, "file": "c.png"},
    ]


def test_a_relative_path_of_the_table_works_too(tmp_path, monkeypatch):
    own(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert colours(read(Path("index.csv"))) == [RED, GREEN, BLUE]


def test_pictures_may_be_bytes_of_a_parquet_file(tmp_path):
    raw = [encoded(plain(colour)) for colour in (BLUE, RED, GREEN)]
    found = read(own(tmp_path, ending="parquet", image=raw))
    assert colours(found) == [BLUE, RED, GREEN]
    assert found.about.columns == ["label", "region", "income"]


def test_a_column_named_file_is_kept(tmp_path):
    found = read(own(tmp_path, file=["x", "y", "z"]))
    assert found.about["file"].to_list() == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("ending", "labels", "read_as"),
    [
        ("csv", ["007", "7", "true"], ["007", "7", "true"]),
        ("csv", ["007", "7", "70"], ["007", "7", "70"]),
        ("parquet", [0, 1, 2], ["0", "1", "2"]),
    ],
)
def test_labels_are_text_as_written(tmp_path, ending, labels, read_as):
    assert read(own(tmp_path, ending=ending, label=labels)).about["label"].to_list() == read_as


def test_pictures_may_be_named_by_numbers(tmp_path):
    path = own(tmp_path, image=["007", "008", "009"])
    for name, colour in zip(("007", "008", "009"), (BLUE, GREEN, RED), strict=True):
        (tmp_path / name).write_bytes(encoded(plain(colour)))
    assert colours(read(path)) == [BLUE, GREEN, RED]


def test_splits_of_a_table_are_chosen_by_any_of_their_names(tmp_path):
    path = own(tmp_path, split=["train", "val", "test"])
    assert read(path).about["split"].to_list() == ["train", "valid", "test"]
    for name in ("valid", "val", "validation", "dev"):
        assert colours(read(path, name)) == [GREEN]
    assert colours(read(path, "train")) == [RED]
    with pytest.raises(DataError, match="own: no split 'trian'; there are: test, train, valid"):
        read(path, "trian")


def test_a_table_without_splits_says_so(tmp_path):
    with pytest.raises(DataError, match="own: no split 'train'; it has none; read it whole"):
        read(own(tmp_path), "train")


def test_a_split_that_is_not_read_may_be_broken(tmp_path):
    path = own(tmp_path, split=["train", "test", "train"])
    (tmp_path / "sub" / "b.png").unlink()
    assert colours(read(path, "train")) == [RED, BLUE]
    with pytest.raises(DataError, match=r"row 1 \('sub/b.png'\)"):
        read(path, "test")


def many(folder: Path) -> Path:
    rows = [
        {"image": "a.png", "label": str(row), "split": ("train", "test")[row % 3 == 0]} for row in range(60)
    ]
    return own(folder, rows)


def test_a_limit_draws_the_same_rows_of_each_split_whatever_is_asked_for(tmp_path):
    path = many(tmp_path)
    whole = read(path, limit=7).about
    assert whole["split"].value_counts().sort("split").rows() == [("test", 7), ("train", 7)]
    for split in ("train", "test"):
        rows = [int(label) for label in read(path, split, limit=7).about["label"]]
        assert rows == [int(label) for label in whole.filter(split=split)["label"]]
        assert rows == sorted(set(rows))
        assert rows != [row for row in range(60) if (row % 3 == 0) == (split == "test")][:7]  # not the first
        larger = [int(label) for label in read(path, split, limit=12).about["label"]]
        assert set(rows) < set(larger)
    assert len(read(path, limit=1000)) == 60


def test_a_limit_draws_the_same_rows_in_every_process(tmp_path):
    path = many(tmp_path)
    with torch.random.fork_rng():
        drawn = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            drawn.append(read(path, limit=7).about)
    assert drawn[0].equals(drawn[1])


# --- a table of the user's own: what is refused -------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"image": ["a.png", "gone.png", "c.png"]},
            r"row 1 \('gone.png'\): No such file or directory; paths start",
        ),
        ({"image": ["a.png", "c.png", "sub"]}, r"row 2 \('sub'\): Is a directory"),
        (
            {"image": ["../a.png", "c.png", "c.png"]},
            r"row 0 \('../a.png'\): not a path below the folder of the",
        ),
        ({"image": ["c.png", "sub/../../x.png", "c.png"]}, "row 1 .*: not a path below"),
        ({"image": ["c.png", "c.png", "/etc/hostname"]}, "row 2 .*: not a path below"),
        ({"image": ["c.png", "leads_out/d.png", "c.png"]}, "row 1 .*: not a path below"),
        ({"image": ["c.png", "loop", "c.png"]}, "row 1 "),
        (
            {"image": ["c.png", None, "c.png"]},
            "column image is empty in 1 rows, first in row 1; fill or remove",
        ),
        ({"image": ["c.png", "c.png", "  "]}, "column image is empty in 1 rows, first in row 2"),
        ({"image": [None] * 3}, "column image is empty in all rows"),
        ({"label": [None, "x", None]}, "column label is empty in 2 rows, first in row 0"),
        ({"label": [None] * 3}, "column label is empty in all rows"),
        ({"split": ["train", None, "test"]}, "column split is empty in 1 rows, first in row 1"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, changed, message):
    folder = tmp_path / "set"
    folder.mkdir()
    plain(RED).save(tmp_path / "a.png")
    (tmp_path / "outside").mkdir()
    plain(RED).save(tmp_path / "outside" / "d.png")
    (folder / "leads_out").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(DataError, match=f"^{folder / 'index.csv'}(, |: ){message}") as caught:
        read(own(folder, **changed))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": ["c.png", "a\0.png", "c.png"]}, r", row 1 \('a\\x00.png'\): not a path below"),
        ({"image": ["c.png", "x" * 5000, "c.png"]}, r", row 1 \('x{100}'\): "),
        ({"image": ["c.png", "a\nb.png", "c.png"]}, r", row 1 \('a\\nb.png'\): No such file"),
        ({"image": [1, 2, 3]}, ": column image holds Int64; give encoded images as bytes, or paths"),
        ({"image": [b"", b"", b""]}, ", row 0: empty, 0 bytes"),
        ({"image": [encoded(plain(RED)), b"GIF", None]}, ": column image is empty in 1 rows, first in row 2"),
        ({"image": [encoded(plain(RED)), b"GIF", b""]}, ", row 1: not an image"),
        ({"label": [float("nan"), 1.0, 2.0]}, ": column label is empty in 1 rows, first in row 0"),
    ],
)
def test_a_row_of_a_parquet_table_that_cannot_be_used_is_named(tmp_path, changed, message):
    with pytest.raises(DataError, match=f"^{tmp_path / 'index.parquet'}{message}") as caught:
        read(own(tmp_path, ending="parquet", **changed))
    assert len(str(caught.value).splitlines()) == 1


def test_labels_that_are_lists_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"column 'label' holds List\(String\), not one value per image"):
        read(own(tmp_path, ending="parquet", label=[["a"], ["b"], ["c"]]))


def test_a_picture_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    path = own(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"row 0 \('a.png'\): Permission denied"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read; is it cut short"),
        ("image,label\n", "no rows; add at least one image"),
        ("file,label\na.png,x\n", r"missing column image; rename one of \['file', 'label'\]"),
        ("image,object\na.png,x\n", r"missing column label; rename one of \['image', 'object'\]"),
        ("path,object\na.png,x\n", r"missing column image, label; rename one of \['path', 'object'\]"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(tmp_path, content, message):
    path = own(tmp_path)
    path.write_text(content)
    with pytest.raises(DataError, match=f"^{path}.*{message}"):
        read(path)


def test_a_table_that_is_none_says_why(tmp_path):
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "index.txt").write_text("image,label\n")
    for name, message in (
        ("cut.parquet", "cut.parquet cannot be read; is it cut short"),
        ("index.txt", "index.txt: expected a file ending in .csv or .parquet"),
        ("gone.csv", "gone.csv: no such file"),
        ("", "expected a file ending in .csv or .parquet"),
    ):
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)


# --- tables and groups --------------------------------------------------------------------------------------


@pytest.fixture
def five():
    pixels = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 8, 8)
    return ImageTable(pixels, pl.DataFrame({"label": ["a", "b", "c", "d", "e"]}))


@pytest.mark.parametrize(
    ("rows", "taken"),
    [
        ([4, 0, 0], "eaa"),
        (torch.tensor([1, 3]), "bd"),
        (torch.tensor([True, False, False, True, False]), "ad"),
        ([False, True, False, False, False], "b"),
        ([-1], "e"),
        ([], ""),
    ],
)
def test_rows_are_taken_from_images_and_columns_alike(five, rows, taken):
    part = five.take(rows)
    assert len(part) == len(taken)
    assert "".join(part.about["label"]) == taken
    assert part.pixels[:, 2, 7, 7].tolist() == ["abcde".index(one) for one in taken]


@pytest.mark.parametrize("rows", [[5], [-6], [True]])
def test_rows_that_are_not_there_are_not_taken(five, rows):
    with pytest.raises(IndexError):
        five.take(rows)


@pytest.mark.parametrize(
    ("values", "groups"),
    [
        (["Asia", None, "Europe"], ["Asia", None, "Europe"]),
        (["Asia", " ", ""], ["Asia", None, None]),
        ([1, 2, None], ["1", "2", None]),
        ([True, False, None], ["true", "false", None]),
        ([1.5, float("nan"), None], ["1.5", None, None]),
        (pl.Series(["x", "y", None], dtype=pl.Categorical), ["x", "y", None]),
    ],
)
def test_a_group_column_is_text_with_blanks_left_blank(values, groups):
    found = group_column(pl.DataFrame({"region": values}), "region")
    assert found.name == "region"
    assert found.to_list() == groups


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("regoin", "no group column 'regoin'; there are: region, empty, blank, nan, captions, raw"),
        ("empty", "column 'empty' is empty in all 2 rows; choose another, there are: region, "),
        ("blank", "column 'blank' is empty in all 2 rows"),
        ("nan", "column 'nan' is empty in all 2 rows"),
        ("captions", r"column 'captions' holds List\(String\), not one value per image; there are: region, "),
        ("raw", "column 'raw' holds Binary, not one value per image"),
    ],
)
def test_a_group_column_that_cannot_be_used_lists_those_there_are(name, message):
    about = pl.DataFrame(
        {
            "region": ["Asia", "Asia"],
            "empty": [None, None],
            "blank": ["", " "],
            "nan": [float("nan")] * 2,
            "captions": [["a"], ["b"]],
            "raw": [b"a", b"b"],
        }
    )
    with pytest.raises(DataError, match=f"^{message}"):
        group_column(about, name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "files"}, "path goes with source: files"),
        ({"source": "manifest", "path": "x"}, "path goes with source: files"),
        ({"source": "manifest", "size": 7}, "size"),
        ({"source": "manifest", "size": 513}, "size"),
        ({"source": "manifest", "size": 64.0}, "size"),
        ({"source": "manifest", "limit": 0}, "limit"),
        ({"source": "folder"}, "source"),
        ({"source": "manifest", "split": "train"}, "split"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        ImageData(name="own", **settings)


def test_the_path_is_no_part_of_what_names_a_run():
    data = ImageData(source="files", name="own", path="x.csv")
    assert data.model_dump() == {"source": "files", "name": "own", "size": 64, "limit": None}


# --- prepared sets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "splits", "columns"),
    [
        ("tiny-imagenet", ["train", "valid"], ["wnid", "label", "synset_words", "file", "split"]),
        ("flickr8k-128", ["test", "train", "valid"], ["file", "captions", "split"]),
        ("cifar10-jpeg", ["test", "train"], ["label", "file", "split"]),
        ("pacs-96", [], ["domain", "label", "file"]),
        ("emoji-cldr-96", [], ["vendor", "emoji", "file", "name", "keywords", "skin_tone", "gender", "base"]),
    ],
)
def test_prepared_sets_can_be_read(prepared, name, splits, columns):
    prepared(name)
    data = ImageData(source="manifest", name=name, size=32, limit=20)
    whole = read_images(data)
    assert whole.pixels.shape == (20 * max(1, len(splits)), 3, 32, 32)
    assert whole.pixels.float().std() > 30
    assert whole.about.columns[: len(columns)] == columns
    assert "image" not in whole.about.columns
    if splits:
        assert whole.about["split"].unique().sort().to_list() == splits
        part = read_images(data, splits[-1])
        chosen = (whole.about["split"] == splits[-1]).to_torch()
        assert torch.equal(part.pixels, whole.take(chosen).pixels)
        assert part.about.equals(whole.take(chosen).about)
    else:
        with pytest.raises(DataError, match=f"{name}: no split 'train'; it has none"):
            read_images(data, "train")


def test_a_column_split_of_a_prepared_set_goes_before_the_name_of_its_file(tmp_path, monkeypatch):
    raw = encoded(plain(RED))
    pl.DataFrame({"image": [raw] * 2, "split": ["train", "dev"]}).write_parquet(
        tmp_path / "train_all.parquet"
    )
    pl.DataFrame({"image": [raw]}).write_parquet(tmp_path / "test.parquet")
    (tmp_path / "labels.txt").write_text("red")
    listed = SimpleNamespace(files=("train_all.parquet", "labels.txt", "test.parquet"))
    monkeypatch.setattr(images, "verified_folder", lambda name: tmp_path)
    monkeypatch.setattr(images, "read_manifest", lambda name: listed)
    found = read_images(ImageData(source="manifest", name="reds"))
    assert found.about["split"].to_list() == ["test", "train", "valid"]


def test_pixels_of_a_prepared_set_are_those_of_its_files(prepared):
    from workbench.manifests import verified_folder

    prepared("cifar10-jpeg")
    found = read_images(ImageData(source="manifest", name="cifar10-jpeg", size=32, limit=50), "test")
    table = pl.read_parquet(verified_folder("cifar10-jpeg") / "test.parquet")
    for pixels, file in zip(found.pixels, found.about["file"], strict=True):
        [raw] = table.filter(file=file)["image"]
        assert (pixels.numpy() == np.asarray(Image.open(BytesIO(raw))).transpose(2, 0, 1)).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "dollarstreet-metadata",
            "^dollarstreet-metadata, metadata.parquet: missing column image; rename one of ",
        ),
        (
            "encoders-squeezenet",
            "^encoders-squeezenet holds no images; workbench data show encoders-squeezenet",
        ),
    ],
)
def test_a_prepared_set_without_pictures_says_so(prepared, name, message):
    prepared(name)
    with pytest.raises(DataError, match=message):
        read_images(ImageData(source="manifest", name=name))
