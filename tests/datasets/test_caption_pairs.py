"""Captioned images: one row order, no image in two splits, a clear message for every table that is wrong."""

import io
import json

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from workbench.datasets.caption_pairs import PairData, Pictures, load_pairs
from workbench.datasets.images import Fitting, ImageData, encoded_images
from workbench.datasets.scenes import ATTRIBUTES, draw_distinct
from workbench.errors import DataError, ManifestError
from workbench.manifests import verified_folder

SCENES = {"source": "scenes", "name": "scenes", "size": 32, "train": 100, "test": 50}


def scenes_of(**changes):
    return load_pairs(PairData(**{**SCENES, **changes}))


@pytest.fixture(scope="module")
def scenes():
    return scenes_of()


def png(*colour, size=(40, 32)) -> bytes:
    raw = io.BytesIO()
    Image.new("RGB", size, colour).save(raw, "png")
    return raw.getvalue()


@pytest.fixture
def pictures(tmp_path):
    """Forty small pictures in a folder below the table; returns the rows of a table of them."""
    (tmp_path / "pictures").mkdir()
    for row in range(40):
        (tmp_path / "pictures" / f"{row}.png").write_bytes(png(row, 2 * row, 3 * row))
    split = ["train"] * 20 + ["val"] * 10 + ["test"] * 10
    return [
        {"image": f"pictures/{row}.png", "caption": f"colour {row}", "split": split[row]} for row in range(40)
    ]


@pytest.fixture
def own(tmp_path):
    """Write rows as a table and read it as a recipe would."""

    def read(rows, name="own.csv", **more):
        path = tmp_path / name
        if path.suffix == ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        else:
            frame = pl.DataFrame(rows, infer_schema_length=None)
            frame.write_csv(path) if path.suffix == ".csv" else frame.write_parquet(path)
        return load_pairs(PairData(source="table", name="own", path=str(path), **more))

    return read


def captions_of(pairs, image):
    return [pairs.texts[row] for row in pairs.choices[image]]


# --- scenes -------------------------------------------------------------------------------------------------


def test_scenes_of_a_split_are_distinct_and_told_whole_in_three_wordings(scenes):
    assert {split: len(rows) for split, rows in scenes.splits.items()} == {
        "train": 100,
        "valid": 50,
        "test": 50,
    }
    assert torch.cat(list(scenes.splits.values())).tolist() == list(range(200))
    assert scenes.choices.shape == (200, 3)
    for rows in scenes.splits.values():
        assert len({scenes.texts[row] for row in scenes.choices[rows, 0]}) == len(rows)
    told = captions_of(scenes, 0)
    assert told[1:] == [f"a picture of {told[0]}", f"here we see {told[0]}"]
    for words in ("colour", "texture", "count", "place"):
        assert any(word in told[0] for word in ATTRIBUTES[words])
    assert told[0].endswith(" background")


def test_distinct_scenes_never_show_the_same_and_are_drawn_as_in_training():
    found = draw_distinct(2000, np.random.default_rng(0))
    assert len({(*scene.values.values(), scene.background) for scene in found}) == 2000
    assert not any(scene.shifted for scene in found)


def test_the_same_seed_draws_the_same_scenes_and_another_draws_others(scenes):
    again, other = scenes_of(), scenes_of(seed=1)
    assert torch.equal(again.pictures.contents, scenes.pictures.contents)
    assert (again.texts, again.order, again.pictures.order) == (
        scenes.texts,
        scenes.order,
        scenes.pictures.order,
    )
    assert torch.equal(again.choices, scenes.choices)
    assert other.order != scenes.order
    assert other.pictures.order != scenes.pictures.order


def test_test_scenes_are_asked_for_each_attribute(scenes):
    assert [one.classes.name for one in scenes.asked] == list(ATTRIBUTES)
    rows = scenes.splits["test"]
    for one in scenes.asked:
        assert torch.equal(one.pictures.contents, scenes.pictures.contents[rows])
        for row, label in zip(rows[:10], one.classes.label[:10], strict=True):
            words = captions_of(scenes, row)[0]
            assert ATTRIBUTES[one.classes.name][label] in words


@pytest.mark.parametrize("key", ["train", "test"])
def test_more_scenes_than_can_be_told_apart_are_refused(key):
    # 8 colours x 6 shapes x 3 textures x 3 counts x 5 places x 4 backgrounds are 8,640, some of them rare.
    with pytest.raises(ValidationError, match="less than or equal to 6000"):
        PairData(**{**SCENES, key: 8641})


def test_drawn_pictures_come_at_any_side(scenes):
    small = scenes.pictures.pixels(slice(3, 5), 16)
    assert (small.shape, small.dtype) == ((2, 3, 16, 16), torch.uint8)
    whole = scenes.pictures.pixels(slice(3, 5), 32)
    assert torch.equal(whole, scenes.pictures.contents[3:5])
    # Shrinking keeps the mean colour, give or take the rounding of each pixel.
    assert (small.float().mean((2, 3)) - whole.float().mean((2, 3))).abs().max() < 1
    # Brought to 32 before the centre is cut out: the 16 in the middle, as they are.
    cut = scenes.pictures.pixels(slice(3, 5), 16, Fitting(shorter=32))
    assert torch.equal(cut, whole[..., 8:24, 8:24])


# --- prepared sets ------------------------------------------------------------------------------------------


def test_flickr8k_has_five_captions_an_image_and_its_published_splits(prepared):
    prepared("flickr8k-128")
    pairs = load_pairs(PairData(source="manifest", name="flickr8k-128"))
    table = pl.read_parquet(verified_folder("flickr8k-128") / "flickr8k_128.parquet").drop("image")
    counts = dict(table["split"].value_counts().iter_rows())
    assert {split: len(rows) for split, rows in pairs.splits.items()} == {
        "train": counts["train"], "valid": counts["val"], "test": counts["test"]
    }  # fmt: skip
    assert pairs.choices.shape == (len(table), 5)
    for row in (0, 1, 4000, len(table) - 1):
        assert captions_of(pairs, row) == [text.strip() for text in table["captions"][row]]
    assert pairs.pictures.pixels(slice(0, 3), 64).shape == (3, 3, 64, 64)
    assert pairs.asked == ()


def test_a_limit_takes_rows_by_their_seed_and_keeps_their_captions(prepared):
    prepared("flickr8k-128")
    data = PairData(source="manifest", name="flickr8k-128", limit=400)
    pairs, again = load_pairs(data), load_pairs(data)
    other = load_pairs(data.model_copy(update={"seed": 1}))
    assert len(pairs.pictures) == 400
    assert pairs.order == again.order
    assert pairs.order != other.order
    table = pl.read_parquet(verified_folder("flickr8k-128") / "flickr8k_128.parquet").drop("image")
    row = int(pairs.pictures.names[7].rpartition(" ")[2])  # names tell the row of the table, not of the draw
    assert captions_of(pairs, 7) == [text.strip() for text in table["captions"][row]]


@pytest.fixture(scope="module")
def emoji():
    return load_pairs(PairData(source="manifest", name="emoji-cldr-96", size=96))


def test_emoji_are_held_out_by_code_point_and_style(prepared, request):
    prepared("emoji-cldr-96")
    pairs = request.getfixturevalue("emoji")
    table = pl.read_parquet(verified_folder("emoji-cldr-96") / "emoji_96.parquet").drop("image")
    about = {row["file"]: row for row in table.to_dicts()}
    assert len(about) == table.height
    files = [name.removeprefix("emoji ") for name in pairs.pictures.names]
    shown = {split: [about[files[row]] for row in rows] for split, rows in pairs.splits.items()}
    emoji = {split: {row["emoji"] for row in rows} for split, rows in shown.items()}
    assert not emoji["train"] & (emoji["valid"] | emoji["test"])
    assert not emoji["valid"] & emoji["test"]
    assert {row["vendor"] for row in shown["train"]} == {"noto", "emojitwo"}
    for split in ("valid", "test"):
        assert {row["vendor"] for row in shown[split]} == {"noto"}
    # Eight in ten for training; the hash of some 3,800 emoji strays by less than three per cent.
    share = len(emoji["train"]) / table["emoji"].n_unique()
    assert share == pytest.approx(0.8, abs=0.03)
    for row in (0, 17, len(files) - 1):
        one, told = about[files[row]], captions_of(pairs, row)
        assert told[0] == one["name"]
        assert told[1] == (f"{one['name']}: {', '.join(one['keywords'])}" if one["keywords"] else one["name"])


def test_held_out_emoji_are_asked_in_the_other_style(prepared, request):
    prepared("emoji-cldr-96")
    pairs = request.getfixturevalue("emoji")
    (asked,) = pairs.asked
    names = [name.removeprefix("emoji ") for name in pairs.pictures.names]
    table = pl.read_parquet(verified_folder("emoji-cldr-96") / "emoji_96.parquet").drop("image")
    about = {row["file"]: row for row in table.to_dicts()}
    shown = [about[name.removeprefix("emoji ")] for name in asked.pictures.names]
    trained = {about[names[row]]["emoji"] for split in ("train", "valid") for row in pairs.splits[split]}
    assert {row["vendor"] for row in shown} == {"emojitwo"}
    assert not {row["emoji"] for row in shown} & trained
    assert [row["name"] for row in shown] == asked.classes.classes
    assert asked.classes.label.tolist() == list(range(len(shown)))
    assert len(shown) == len(set(asked.classes.classes)) == 100
    assert not {row["file"] for row in shown} & set(names)


def test_prepared_sets_are_asked_for_their_labels(prepared):
    prepared("flickr8k-128")
    prepared("cifar10-jpeg")
    data = PairData(source="manifest", name="flickr8k-128", limit=300, classify=("cifar10-jpeg",), asked=100)
    (asked,) = load_pairs(data).asked
    assert len(asked.pictures) == len(asked.classes.label) == 100
    assert len(asked.classes.classes) == 10
    # Of the half that the CIFAR encoders never saw, with its own labels.
    table = encoded_images(ImageData(source="manifest", name="cifar10-jpeg", limit=100), "test")
    assert set(table["split"]) == {"test"}
    names = [asked.classes.classes[label] for label in asked.classes.label]
    assert names == [label.replace("_", " ") for label in table["label"]]
    assert asked.pictures.contents == table["image"].to_list()
    with pytest.raises(DataError, match="no column label, so it cannot be asked for classes"):
        load_pairs(data.model_copy(update={"classify": ("flickr8k-128",)}))


def test_a_prepared_set_without_captions_is_refused(prepared):
    prepared("cifar10-jpeg")
    with pytest.raises(DataError, match="cifar10-jpeg: no column captions; give a captioned set"):
        load_pairs(PairData(source="manifest", name="cifar10-jpeg"))


def test_an_unknown_split_of_a_prepared_set_is_refused(prepared):
    prepared("flickr8k-128")
    with pytest.raises(DataError, match="no split 'dev2'; there are: test, train, valid"):
        encoded_images(ImageData(source="manifest", name="flickr8k-128"), "dev2")


def test_a_missing_prepared_set_says_where_it_was_looked_for(monkeypatch):
    monkeypatch.delenv("WORKBENCH_DATA", raising=False)
    with pytest.raises(ManifestError, match="emoji-cldr-96 is not on this machine"):
        load_pairs(PairData(source="manifest", name="emoji-cldr-96"))


# --- a table of one's own -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["own.csv", "own.parquet", "own.JSON", "llava.json"])
def test_every_kind_of_table_gives_the_same_pairs(own, pictures, name):
    rows = pictures
    if name == "llava.json":
        rows = [
            {
                "id": str(row),
                "image": one["image"],
                "split": one["split"],
                "conversations": [
                    {"from": "human", "value": "Describe it.\n<image>"},
                    {"from": "gpt", "value": f" {one['caption']} "},
                ],
            }
            for row, one in enumerate(pictures)
        ]
    name = name.lower()
    if name == "own.parquet":
        rows = [{**one, "captions": [one["caption"]]} for one in rows]
    pairs = own(rows, name)
    assert pairs.texts == [f"colour {row}" for row in range(40)]
    assert pairs.choices.tolist() == [[row] for row in range(40)]
    assert {split: rows.tolist() for split, rows in pairs.splits.items()} == {
        "train": list(range(20)), "valid": list(range(20, 30)), "test": list(range(30, 40))
    }  # fmt: skip
    pixels = pairs.pictures.pixels(slice(4, 6), 16)
    assert pixels[:, :, 8, 8].tolist() == [[4, 8, 12], [5, 10, 15]]
    assert pairs.pictures.names[4] == "own, row 4"


def test_pictures_may_lie_in_the_table_as_bytes(own):
    split = ["train"] * 10 + ["valid"] * 10 + ["test"] * 10
    rows = [{"image": png(row, 0, 0), "caption": f"{row}", "split": split[row]} for row in range(30)]
    pairs = own(rows, "own.parquet")
    assert pairs.pictures.pixels(slice(7, 8), 16)[0, :, 3, 3].tolist() == [7, 0, 0]


def test_several_rows_of_one_image_are_its_captions(own, pictures):
    """As in the usual CSV files of captions: else an image would be a wrong answer to its own caption."""
    rows = [{**one, "caption": f"{one['caption']}, said again"} for one in pictures[:5]]
    pairs = own([*pictures, *rows])
    assert len(pairs.pictures) == 40
    assert captions_of(pairs, 3) == ["colour 3", "colour 3, said again"]
    assert captions_of(pairs, 9) == ["colour 9", "colour 9"]  # fewer than others have: repeated
    with pytest.raises(DataError, match="own.csv, row 0: this image is in two splits; it belongs to one"):
        own([*pictures, {**pictures[0], "split": "test"}])


def test_words_that_look_like_numbers_or_nothing_stay_captions(own, pictures):
    words = ["007", "1e5", "true", "null", "nan", "None"]
    rows = [{**one, "caption": words[row % 6]} for row, one in enumerate(pictures)]
    assert own(rows).texts == words


def test_without_a_split_column_a_hash_keeps_a_tenth_for_each(own, pictures, tmp_path):
    for row in range(40, 300):
        (tmp_path / "pictures" / f"{row}.png").write_bytes(png(row % 256, row // 256, 0))
    rows = [{"image": f"pictures/{row}.png", "caption": f"{row}"} for row in range(300)]
    pairs = own(rows)
    counts = {split: len(rows) for split, rows in pairs.splits.items()}
    assert sum(counts.values()) == 300
    # 30 expected, a deviation of about 5.
    assert 15 < counts["valid"] < 45
    assert 15 < counts["test"] < 45
    # The split of a row does not depend on how many rows are taken.
    names = {pairs.pictures.names[row] for row in pairs.splits["test"]}
    few = own(rows, limit=200)
    drawn = set(few.pictures.names)
    assert {few.pictures.names[row] for row in few.splits["test"]} == names & drawn


def test_other_pixels_of_the_same_name_and_size_are_another_set(own, pictures, tmp_path):
    before = own(pictures)
    path = tmp_path / "pictures" / "0.png"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert own(pictures).pictures.order != before.pictures.order
    assert own(pictures).order == before.order  # of captions


def test_a_table_is_read_from_any_folder(own, pictures, tmp_path, monkeypatch):
    own(pictures)
    monkeypatch.chdir(tmp_path.parent)
    path = f"{tmp_path.name}/own.csv"
    assert len(load_pairs(PairData(source="table", name="own", path=path)).pictures) == 40


def changed(rows, row, **values):
    return [{**one, **values} if place == row else one for place, one in enumerate(rows)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: [{"picture": one["image"]} for one in rows], "own.csv: missing column image; rename"),
        (lambda rows: [{"image": one["image"]} for one in rows], "own.csv: missing column captions"),
        (lambda rows: changed(rows, 7, caption=" "), "own, row 7: no caption; 1 images have none"),
        (lambda rows: changed(rows, 7, caption=None), "own, row 7: no caption"),
        (lambda rows: changed(rows, 7, image="pictures/absent.png"), "pictures/absent.png is not there"),
        (lambda rows: changed(rows, 7, image="pictures"), "row 7: pictures is not there; paths start at the"),
        (lambda rows: changed(rows, 7, image=None), "column image is empty in 1 rows, first in row 7"),
        (lambda rows: changed(rows, 7, image="../x.png"), "row 7 .*: not a path below the folder"),
        (lambda rows: changed(rows, 7, image="/etc/passwd"), "row 7 .*: not a path below the folder"),
        (lambda rows: changed(rows, 7, image="a\0b"), "row 7 .*: not a path below the folder"),
        (lambda rows: changed(rows, 7, split="holdout"), "split holds 'holdout'; allowed are"),
        (lambda rows: rows[:25], "own: too few rows in {'valid': 5, 'test': 0}; every split"),
        (lambda rows: {"image": [], "caption": []}, "own.csv: no rows"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_used_is_one_message(own, pictures, spoil, message):
    with pytest.raises(DataError, match=message) as caught:
        own(spoil(pictures))
    assert "\n" not in str(caught.value)


def test_a_link_out_of_the_folder_is_refused(own, pictures, tmp_path_factory, tmp_path):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    outside.write_bytes(png(1, 2, 3))
    (tmp_path / "pictures" / "link.png").symlink_to(outside)
    with pytest.raises(DataError, match="not a path below the folder of the table; put the picture there"):
        own(changed(pictures, 3, image="pictures/link.png"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.txt", b"image,caption\n", "own.txt: give a CSV, JSON or Parquet file"),
        ("absent.csv", None, "absent.csv: give a CSV, JSON or Parquet file"),
        ("own.json", b"{", "own.json cannot be read; is it cut short?"),
        ("own.json", b'[{"image": "a", "conversations": [{"who": "gpt"}]}]', "turns with the keys from and"),
        ("own.json", b'[{"image": "a", "conversations": ["gpt"]}]', "turns with the keys from and"),
        ("own.json", b'[{"image": "a", "caption": 7}]', "caption holds Int64; give text, or lists"),
        ("own.json", b'[{"image": 3, "caption": "a"}]', "column image holds Int64"),
        ("own.parquet", b"PAR1", "own.parquet cannot be read; is it cut short?"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_is_one_message(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_pairs(PairData(source="table", name="own", path=str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_a_conversation_without_an_answer_is_an_image_without_a_caption(own, pictures):
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A colour."}]
    rows = [{"image": one["image"], "conversations": turns} for one in pictures]
    rows[5]["conversations"] = turns[:1]
    with pytest.raises(DataError, match="own, row 5: no caption; 1 images have none"):
        own(rows, "own.json")
    rows[5]["conversations"] = None
    with pytest.raises(DataError, match="own, row 5: no caption; 1 images have none"):
        own(rows, "own.json")


def test_a_damaged_picture_is_named_when_it_is_decoded(own, pictures, tmp_path):
    (tmp_path / "pictures" / "9.png").write_bytes(png(1, 2, 3)[:30])
    pairs = own(pictures)
    with pytest.raises(DataError, match="own, row 9: "):
        pairs.pictures.pixels(slice(0, 20), 32)


# --- settings, and how pictures become squares --------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [{"source": "table"}, {"source": "features"}, {"source": "scenes", "path": "x"},
             {"source": "manifest", "path": "x"}]
)  # fmt: skip
def test_a_path_goes_with_ones_own_data_only(data):
    with pytest.raises(ValidationError, match="path goes with source: table or features, and with no other"):
        PairData(name="x", **data)


def test_where_data_lie_is_no_part_of_a_recipes_hash(tmp_path):
    data = PairData(source="table", name="own", path=str(tmp_path))
    assert "path" not in data.model_dump(mode="json")


def striped(width, height):
    """White, with a black line along the middle of the longer side."""
    levels = np.full((height, width, 3), 255, np.uint8)
    levels[:, width // 2 - 2 : width // 2 + 2] = 0
    raw = io.BytesIO()
    Image.fromarray(levels).save(raw, "png")
    return raw.getvalue()


def test_pictures_are_cut_squashed_and_resampled_as_asked():
    pictures = Pictures([striped(80, 40)], ["it"], "")
    plain = pictures.pixels(slice(None), 40)[0, 0]
    assert (plain[0] == 0).sum() == 4  # as large as it was, the centre cut out
    squashed = pictures.pixels(slice(None), 40, Fitting(squash=True))[0, 0]
    assert (squashed[0] < 128).sum() == 2  # half as wide
    closer = pictures.pixels(slice(None), 40, Fitting(shorter=80))[0, 0]
    assert (closer[0] < 128).sum() == 8  # twice as large, then cut
    blocky = pictures.pixels(slice(None), 40, Fitting(shorter=80, resampling="nearest"))[0, 0]
    assert set(blocky.unique().tolist()) == {0, 255}
