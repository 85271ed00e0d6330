"""Arrays that were computed elsewhere: a good folder opens, every bad one gives a message with its place."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from workbench.errors import DataError
from workbench.zoo_files import features_from

IMAGES = 30  # ten of each split
# Images 0 to 9 have two captions each, the others one; the table is not sorted by image.
ROWS = [*range(IMAGES - 1, -1, -1), *range(10)]
SPLITS = ["train"] * 10 + ["valid"] * 10 + ["test"] * 10


def rows_of(count: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """Two text encoders and two image encoders, as numpy files and a CSV."""
    for kind, count in (("texts", len(ROWS)), ("images", IMAGES)):
        (tmp_path / kind).mkdir()
        for seed, name in enumerate(("one", "two")):
            np.save(tmp_path / kind / f"{name}.npy", rows_of(count, 4 + seed, seed))
    pairs_of(tmp_path)
    return tmp_path


def pairs_of(folder: Path, **change: list) -> None:
    columns = {"image": ROWS, "split": [SPLITS[row] for row in ROWS]}
    pl.DataFrame({**columns, **change}).write_csv(folder / "pairs.csv")


def feature_table(path: Path, content: np.ndarray, ids: list, as_array: bool = False) -> None:
    kind = pl.Array(pl.Float32, content.shape[1]) if as_array else pl.List(pl.Float32)
    pl.DataFrame({"id": ids, "feature": pl.Series(content.tolist(), dtype=kind)}).write_parquet(path)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(DataError, match=message):
        features_from(folder)


def test_a_good_folder_opens(folder):
    zoo = features_from(folder)
    assert (list(zoo.texts), list(zoo.images), zoo.asked) == (["one", "two"], ["one", "two"], ())
    assert zoo.pairs() == [("one", "one"), ("one", "two"), ("two", "one"), ("two", "two")]
    assert [zoo.images[name].width for name in ("one", "two")] == [4, 5]
    assert np.array_equal(zoo.texts["two"].array, rows_of(len(ROWS), 5, 1))
    assert zoo.images["one"].folder is None
    for start, name in ((0, "train"), (10, "valid"), (20, "test")):
        assert zoo.splits[name].tolist() == list(range(start, start + 10))
        assert zoo.splits[name].dtype == torch.int64
    # Image 29 is row 0 of the table, 0 is row 29; 0 to 9 come again from row 30 on. One caption counts twice.
    assert zoo.choices.shape == (IMAGES, 2)
    assert zoo.choices[[0, 9, 10, 29]].tolist() == [[29, 30], [20, 39], [19, 19], [0, 0]]


def test_three_captions_and_two_are_filled_up_to_three(folder):
    pairs_of(folder, image=[*ROWS[:-1], 0], split=[*[SPLITS[row] for row in ROWS[:-1]], "train"])
    # Image 0 has the rows 29, 30 and 39, image 1 the rows 28 and 31.
    assert features_from(folder).choices[[0, 1, 9]].tolist() == [[29, 30, 39], [28, 31, 28], [20, 20, 20]]


@pytest.mark.parametrize("as_array", [False, True])
def test_a_folder_of_parquet_files_opens_as_one_of_numpy_files_does(folder, as_array):
    expected = features_from(folder)
    for kind, count in (("texts", len(ROWS)), ("images", IMAGES)):
        for path in (folder / kind).glob("*.npy"):
            ids = [f"row {row}" for row in range(count)]
            feature_table(path.with_suffix(".parquet"), np.load(path), ids, as_array)
            path.unlink()
    pl.read_csv(folder / "pairs.csv").write_parquet(folder / "pairs.parquet")
    (folder / "pairs.csv").unlink()
    found = features_from(folder)
    assert torch.equal(found.choices, expected.choices)
    for kind in ("texts", "images"):
        for name, features in getattr(expected, kind).items():
            other = getattr(found, kind)[name]
            everything = torch.arange(len(features))
            torch.testing.assert_close(other.unit(everything), features.unit(everything))


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_table_from_a_spreadsheet_opens(folder, ending, mark):
    path = folder / "pairs.csv"
    path.write_bytes(mark + path.read_text().replace("\n", ending).encode())
    assert features_from(folder).splits["test"].tolist() == list(range(20, 30))


# --- the table of pairs -------------------------------------------------------------------------------------


def test_a_folder_without_a_table_is_refused(folder):
    (folder / "pairs.csv").unlink()
    refused(folder, "has no pairs.csv or pairs.parquet")
    refused(folder / "nowhere", "has no pairs.csv or pairs.parquet")


@pytest.mark.parametrize(
    "content",
    [b"", b"image,split\n", b"image\n0\n", b"split\ntrain\n", b"image,split\na.png,train\n", b"\xff\xfe\x00"],
)
def test_a_table_without_its_columns_or_rows_is_refused(folder, content):
    (folder / "pairs.csv").write_bytes(content)
    refused(folder, "pairs.csv")


def test_a_damaged_parquet_table_is_refused(folder):
    (folder / "pairs.parquet").write_bytes(b"PAR1 and no more")
    refused(folder, "pairs.parquet cannot be read")


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("image", 3, None, "pairs.csv, row 3: image is None"),
        ("split", 5, None, "pairs.csv, row 5: split is None"),
        ("split", 7, "dev", "pairs.csv, row 7: split is 'dev'; .* one of train, valid, test"),
        ("split", 7, "Train", "pairs.csv, row 7: split is 'Train'"),
        ("image", 2, 30, "row 2: there is no image 30; the 30 images are numbered from 0"),
        ("image", 4, -1, "row 4: there is no image -1"),
        ("image", 0, 28, "image 29: no caption"),
        ("split", 39, "test", r"image 9: its captions are in test and train \(rows \[20, 39\]"),
    ],
)
def test_a_bad_cell_is_refused_by_its_row(folder, column, row, value, message):
    columns = {"image": list(ROWS), "split": [SPLITS[row] for row in ROWS]}
    columns[column][row] = value
    pairs_of(folder, **columns)
    refused(folder, message)


def test_a_split_of_fewer_than_ten_images_is_refused(folder):
    pairs_of(folder, split=["train" if row < 20 or row == 25 else "test" for row in ROWS])
    refused(folder, "fewer than ten images in valid, test")


# --- arrays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_a_folder_without_arrays_is_refused(folder, kind):
    for path in (folder / kind).iterdir():
        path.unlink()
    refused(folder, f"{kind} holds no .npy or .parquet file")
    (folder / kind).rmdir()
    refused(folder, f"{kind} holds no .npy or .parquet file")


def test_captions_that_are_not_those_of_the_table_are_refused(folder):
    np.save(folder / "texts" / "two.npy", rows_of(len(ROWS) - 1, 4, 0))
    refused(folder, "texts/two has 39 rows, the table of pairs has 40")


def test_image_encoders_of_unequal_rows_are_refused(folder):
    np.save(folder / "images" / "two.npy", rows_of(IMAGES + 1, 4, 0))
    refused(folder, "one has 30 rows and two has 31")


@pytest.mark.parametrize("kind", ["texts", "images"])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e6])
def test_a_bad_row_is_refused_by_file_and_number(folder, kind, value):
    content = np.load(folder / kind / "two.npy")
    content[17] = value
    np.save(folder / kind / "two.npy", content)
    refused(folder, f"{kind}/two.npy, row 17: the features are")


@pytest.mark.parametrize(
    "content",
    [np.ones((IMAGES, 3), np.int64), np.ones(IMAGES), np.ones((IMAGES, 0)), np.array(1.0), np.array(["a"])],
)
def test_what_is_no_table_of_floating_point_numbers_is_refused(folder, content):
    np.save(folder / "images" / "two.npy", content)
    refused(folder, "images/two.npy")


class Bomb:
    """Runs code when unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_pickled_objects_are_refused_without_being_opened(folder, tmp_path):
    trace, path = tmp_path / "trace", folder / "images" / "two.npy"
    np.save(path, np.array([Bomb(trace)] * IMAGES), allow_pickle=True)
    refused(folder, "images/two.npy holds no readable array of numbers")
    path.write_bytes(pickle.dumps(Bomb(trace)))
    refused(folder, "images/two.npy holds no readable array of numbers")
    assert not trace.exists()


def test_a_numpy_archive_is_refused(folder):
    path = folder / "images" / "two.npy"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "images" / "one.npy", "one.npy")
    refused(folder, "images/two.npy holds no readable array of numbers")


@pytest.mark.parametrize("length", [0, 5, 9, 60, 127, 300])
def test_an_array_that_is_cut_short_is_refused(folder, length):
    path = folder / "images" / "two.npy"
    path.write_bytes(path.read_bytes()[:length])
    refused(folder, "images/two.npy holds no readable array of numbers")


@pytest.mark.parametrize(
    "raw", [b"{'descr': '<f4', 'fortran_order': False, 'shape': (", b"'shape': (99999999999999, 5)"]
)
def test_a_head_that_says_what_is_not_so_is_refused(folder, raw):
    path = folder / "images" / "two.npy"
    content = path.read_bytes()
    path.write_bytes(content[:10] + raw.ljust(117) + b"\n" + content[128:])
    refused(folder, "images/two.npy holds no readable array of numbers")


def test_every_changed_byte_of_a_head_is_refused_or_harmless(folder):
    path = folder / "images" / "two.npy"
    content, messages = path.read_bytes(), []
    for place in range(0, 127, 2):
        path.write_bytes(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
        try:
            zoo = features_from(folder)
        except DataError as problem:
            messages.append(str(problem))
        else:
            assert zoo.images["two"].array.shape == (IMAGES, 5)
    assert len(messages) > 50
    assert all("two" in message for message in messages)


# --- tables with ids ----------------------------------------------------------------------------------------


def ids_of(count: int = IMAGES) -> list[str]:
    return [f"{row:03}.jpg" for row in range(count)]


def test_ids_in_another_order_are_refused(folder):
    ids = ids_of()
    feature_table(folder / "images" / "b.parquet", rows_of(IMAGES, 3, 5), ids)
    feature_table(folder / "images" / "c.parquet", rows_of(IMAGES, 3, 6), ids)
    assert list(features_from(folder).images) == ["b", "c", "one", "two"]
    feature_table(folder / "images" / "c.parquet", rows_of(IMAGES, 3, 6), ids[::-1])
    # The array files carry no ids and are taken to be in the order of b.
    refused(folder, "rows of b and c are in different order")


def test_ids_tell_where_one_ends_and_the_next_begins(folder):
    feature_table(folder / "images" / "b.parquet", rows_of(IMAGES, 3, 5), ["ab", "c", *ids_of(28)])
    feature_table(folder / "images" / "c.parquet", rows_of(IMAGES, 3, 6), ["a", "bc", *ids_of(28)])
    refused(folder, "rows of b and c are in different order")


def test_two_files_of_one_name_are_refused(folder):
    feature_table(folder / "images" / "two.parquet", rows_of(IMAGES, 3, 5), ids_of())
    refused(folder, "images/two.parquet: there are two files of that name")


@pytest.mark.parametrize(("place", "value"), [(4, None), (6, "002.jpg")])
def test_a_missing_id_and_one_that_is_there_twice_are_refused_by_row(folder, place, value):
    ids = ids_of()
    ids[place] = value
    feature_table(folder / "images" / "b.parquet", rows_of(IMAGES, 3, 5), ids)
    refused(folder, f"images/b.parquet, row {place}: id {value!r} is missing or there twice")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"name": ids_of(2), "feature": [[1.0], [1.0]]}, "b.parquet: give the columns id and feature"),
        ({"id": ids_of(2), "vector": [[1.0], [1.0]]}, "b.parquet: give the columns id and feature"),
        (
            {"id": ids_of(3), "feature": [[1.0], [1.0], [1.0, 2.0]]},
            "b.parquet, row 2: the feature is no list",
        ),
        ({"id": ids_of(3), "feature": [[1.0], None, [1.0]]}, "b.parquet, row 1: the feature is no list"),
        ({"id": ids_of(2), "feature": [[1.0, None], [1.0, 1.0]]}, "b.parquet: features are object"),
        ({"id": ids_of(2), "feature": [1.0, 2.0]}, "b.parquet, row 0: the feature is no list"),
        ({"id": ids_of(2), "feature": ["1", "2"]}, "b.parquet, row 0: the feature is no list"),
        ({"id": ids_of(2), "feature": [["1"], ["2"]]}, "b.parquet: features are <U1"),
        ({"id": ids_of(2), "feature": [[1], [2]]}, "b.parquet: features are int64"),
        ({"id": ids_of(2), "feature": [[1.0], [0.0]]}, "b.parquet, row 1: the features are all zeros"),
        ({"id": [], "feature": []}, "b.parquet, row 0: the feature is no list"),
    ],
)
def test_a_bad_table_of_features_is_refused_by_file_and_row(folder, columns, message):
    pl.DataFrame(columns).write_parquet(folder / "images" / "b.parquet")
    refused(folder, f"images/{message}")


def test_a_table_of_features_that_is_cut_short_is_refused(folder):
    path = folder / "texts" / "b.parquet"
    feature_table(path, rows_of(len(ROWS), 3, 5), ids_of(len(ROWS)))
    path.write_bytes(path.read_bytes()[:-20])
    refused(folder, "b.parquet cannot be read")
