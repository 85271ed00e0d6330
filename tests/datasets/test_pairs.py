"""Own pairs: what is read, what is refused, and that no order survives."""

import random
import unicodedata

import polars as pl
import pytest
from pydantic import ValidationError

from workbench.datasets.pairs import COLUMNS, PairData, load_pairs, read_table, unique_texts
from workbench.errors import DataError

HEADER = ",".join(COLUMNS) + "\n"
COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def rows_of(count: int, first: int = 0) -> list[dict]:
    """Rows of as many pairs, each high under one condition and low under another, high first."""
    rows = []
    for number in range(first, first + count):
        about = {"sentence1": f"A kite, number {number}.", "sentence2": f"Drum number {number}."}
        asked = ("The shape.", "The sound.") if number % 2 else ("The sound.", "The shape.")
        rows += [{**about, "condition": name, "label": 1.0 - place} for place, name in enumerate(asked)]
    return rows


def write(path, rows):
    frame = pl.DataFrame(rows, infer_schema_length=None)
    if path.suffix == ".csv":
        frame.write_csv(path)
    else:
        frame.write_parquet(path)
    return path


def load(path, **settings):
    return load_pairs(PairData(source="files", name="own", path=str(path), **settings))


def load_split(folder, rows, **settings):
    """Load rows as the train split of a folder whose validation split is fine."""
    write(folder / "train.parquet", rows)
    write(folder / "valid.parquet", rows_of(2, first=1000))
    return load(folder, **settings)["train"]


# --- what is read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_one_file_is_divided_by_pairs_and_loses_nothing(tmp_path, ending):
    rows = rows_of(40)
    splits = load(write(tmp_path / f"own.{ending}", rows))
    assert {split: table["pair"].n_unique() for split, table in splits.items()} == {
        "train": 28,  # 40 pairs 70 : 10 : 20
        "valid": 4,
        "test": 8,
    }
    back = pl.concat(table.select(COLUMNS) for table in splits.values())
    assert back.sort(COLUMNS).equals(pl.DataFrame(rows).select(COLUMNS).sort(COLUMNS))


def test_the_smallest_allowed_file_fills_every_split(tmp_path):
    splits = load(write(tmp_path / "own.csv", rows_of(20)))
    assert {split: table.height for split, table in splits.items()} == {"train": 28, "valid": 4, "test": 8}


def test_both_directions_of_a_pair_fall_into_one_split(tmp_path):
    rows = rows_of(40)
    turned = [{**row, "sentence1": row["sentence2"], "sentence2": row["sentence1"]} for row in rows]
    splits = load(write(tmp_path / "own.csv", rows + turned))
    for table in splits.values():
        sides = {frozenset(pair) for pair in table.select("sentence1", "sentence2").iter_rows()}
        assert table.height == 4 * len(sides)


def test_reading_a_file_in_reverse_gives_the_same_table(tmp_path):
    rows = rows_of(30)
    shuffled = random.Random(0).sample(rows, len(rows))
    one = load(write(tmp_path / "one.csv", rows))
    for order in (rows[::-1], shuffled):
        other = load(write(tmp_path / "other.csv", order))
        assert all(one[split].equals(other[split]) for split in one)


def test_the_higher_label_does_not_come_first_more_often_than_last(tmp_path):
    table = load(write(tmp_path / "own.parquet", rows_of(400)))["train"]
    first = table.group_by("pair", maintain_order=True).agg(pl.col("label").first())["label"]
    # 280 fair coins: standard error 0.03; the file itself has a share of 1.
    assert 0.35 < first.mean() < 0.65


def test_the_rows_of_a_pair_stand_together_and_are_numbered_from_zero(tmp_path):
    table = load(write(tmp_path / "own.csv", rows_of(30)))["train"]
    numbers = table["pair"].to_list()
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(21))
    assert (
        table.group_by("pair").agg(pl.struct("sentence1", "sentence2").n_unique())["sentence1"] == 1
    ).all()


@pytest.mark.parametrize("text", ["007", "true", "nan", "None", "1e5", "[1,2]", '{"a":1}', "=HYPERLINK()"])
def test_text_that_looks_like_another_type_stays_text(tmp_path, text):
    odd = {"sentence1": text, "sentence2": "A drum.", "condition": text, "label": 0.5}
    # All texts of the column look alike, so that a reader who guesses types would guess wrong.
    rows = [{**row, "sentence1": text, "condition": text} for row in rows_of(20)]
    splits = load(write(tmp_path / "own.csv", [*rows, odd]))
    tables = splits.values()
    assert unique_texts(tables, "sentence1") == [text]
    assert unique_texts(tables, "condition") == [text]


def test_composed_and_decomposed_letters_are_one_text(tmp_path):
    rows = [
        {**row, "condition": form} for row, form in zip(rows_of(2), [COMPOSED, DECOMPOSED] * 2, strict=True)
    ]
    rows[1]["sentence1"] = rows[0]["sentence1"] = COMPOSED
    rows[1]["sentence1"] = DECOMPOSED
    table = load_split(tmp_path, rows)
    assert table["condition"].unique().to_list() == [COMPOSED]
    assert table["pair"].n_unique() == 2  # the twins are rows of one pair
    assert all(unicodedata.is_normalized("NFC", text) for text in table["sentence1"])


def test_twins_of_one_pair_fall_into_one_split(tmp_path):
    rows = [
        {**row, "sentence1": unicodedata.normalize(form, f"{COMPOSED} {row['sentence1']}")}
        for row in rows_of(30)
        for form in ("NFC", "NFD")
    ]
    splits = load(write(tmp_path / "own.csv", rows))
    assert sum(table["pair"].n_unique() for table in splits.values()) == 30
    assert sum(table["sentence1"].n_unique() for table in splits.values()) == 30


def test_outer_white_space_is_no_difference(tmp_path):
    rows = rows_of(2)
    rows[0]["condition"] = f"  {rows[0]['condition']}\n"
    assert set(load_split(tmp_path, rows)["condition"]) == {"The sound.", "The shape."}


def test_labels_are_brought_to_zero_and_one(tmp_path):
    rows = rows_of(2)
    for row, label in zip(rows, [1, 5, 2, 4], strict=True):
        row["label"] = label
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.csv", rows)
    write(tmp_path / "folder" / "valid.csv", rows)
    found = load(tmp_path / "folder", label_range=(1, 5))["train"]["label"]
    assert sorted(found) == [0.0, 0.25, 0.75, 1.0]  # (label - 1) / 4


def test_further_columns_are_kept(tmp_path):
    rows = [{**row, "source": "mine"} for row in rows_of(20)]
    assert load(write(tmp_path / "own.csv", rows))["train"]["source"].unique().to_list() == ["mine"]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    rows = "".join(f"kite {n},drum {n},The shape.,{n % 2}\r\n" for n in range(30))
    (tmp_path / "own.csv").write_bytes(("\ufeff" + HEADER.strip() + "\r\n" + rows).encode())
    assert load(tmp_path / "own.csv")["train"].columns[:4] == list(COLUMNS)


def test_a_limit_takes_whole_pairs(tmp_path):
    splits = load(write(tmp_path / "own.csv", rows_of(60)), limit=5)
    assert all(table["pair"].n_unique() == 5 and table.height == 10 for table in splits.values())


def test_conditions_that_are_not_trained_on_are_marked_unseen(tmp_path):
    write(tmp_path / "train.csv", rows_of(4))
    held_out = rows_of(2, first=100)
    held_out[0]["condition"] = "The weight."
    write(tmp_path / "valid.csv", held_out)
    splits = load(tmp_path)
    assert splits["train"]["condition_kind"].unique().to_list() == ["seen"]
    kinds = dict(splits["valid"].select("condition", "condition_kind").iter_rows())
    assert kinds == {"The weight.": "unseen", "The sound.": "seen", "The shape.": "seen"}


def test_a_set_that_says_itself_how_new_a_condition_is_is_believed(tmp_path):
    rows = [{**row, "condition_kind": "rephrased"} for row in rows_of(20)]
    splits = load(write(tmp_path / "own.csv", rows))
    assert splits["test"]["condition_kind"].unique().to_list() == ["rephrased"]


# --- a folder of splits -------------------------------------------------------------------------------------


def csts_like(folder, test_label=-1):
    """Invented rows under the published file names and on the published scale."""
    for split, first, count in (("train", 0, 8), ("validation", 50, 4), ("test", 90, 4)):
        rows = [{**row, "label": int(1 + 4 * row["label"])} for row in rows_of(count, first)]
        if split == "test":
            rows = [{**row, "label": test_label} for row in rows]
        write(folder / f"csts_{split}.csv", rows)
    return folder


def test_a_test_split_with_withheld_labels_is_left_out_and_named(tmp_path, caplog):
    splits = load(csts_like(tmp_path), label_range=(1, 5))
    assert {split: table["pair"].n_unique() for split, table in splits.items()} == {"train": 8, "valid": 4}
    assert set(splits["train"]["label"]) == {0.0, 1.0}
    assert "csts_test.csv" in caplog.text


def test_only_withheld_labels_are_left_out_never_wrong_ones(tmp_path):
    with pytest.raises(DataError, match=r"own, test: label 9\.0 in row 0 is outside 1\.\.5"):
        load(csts_like(tmp_path, test_label=9), label_range=(1, 5))


def test_a_test_split_of_texts_for_labels_is_refused(tmp_path):
    csts_like(tmp_path)
    write(tmp_path / "csts_test.csv", [{**row, "label": "high"} for row in rows_of(4, 90)])
    with pytest.raises(DataError, match="own, test: label in row 0 is 'high', not a number"):
        load(tmp_path, label_range=(1, 5))


def test_a_training_split_with_one_label_outside_the_range_is_refused(tmp_path):
    write(tmp_path / "train.csv", [{**row, "label": 5} for row in rows_of(4)])
    write(tmp_path / "valid.csv", rows_of(4, 50))
    with pytest.raises(DataError, match="own, train: label 5"):
        load(tmp_path)


def test_two_files_for_one_split_are_refused(tmp_path):
    csts_like(tmp_path)
    write(tmp_path / "my_dev.parquet", rows_of(4))
    with pytest.raises(DataError, match=r"more than one file for valid: csts_validation.csv, my_dev.parquet"):
        load(tmp_path, label_range=(1, 5))


def test_a_folder_without_a_validation_file_says_what_it_holds(tmp_path):
    write(tmp_path / "train.csv", rows_of(4))
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"missing: valid; it holds: \['notes.txt', 'train.csv'\]"):
        load(tmp_path)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path, column):
    rows = [{name: value for name, value in row.items() if name != column} for row in rows_of(20)]
    with pytest.raises(DataError, match=f"own.csv: missing column {column}; needed are .*found \\["):
        load(write(tmp_path / "own.csv", rows))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("column", COLUMNS)
def test_a_null_is_named_by_column_and_row(tmp_path, column, ending):
    rows = rows_of(20)
    rows[7][column] = None
    with pytest.raises(DataError, match=f"column {column} is empty in 1 rows, first in row 7"):
        load(write(tmp_path / f"own.{ending}", rows))


@pytest.mark.parametrize("label", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_label_that_is_no_number_is_named_by_row(tmp_path, label, ending):
    rows = rows_of(20)
    rows[3]["label"] = label
    with pytest.raises(DataError, match="label in row 3 is .*, not a number"):
        load(write(tmp_path / f"own.{ending}", rows))


def test_a_label_in_words_is_quoted(tmp_path):
    rows = [{**row, "label": str(row["label"])} for row in rows_of(20)]
    rows[5]["label"] = "high"
    with pytest.raises(DataError, match="label in row 5 is 'high', not a number"):
        load(write(tmp_path / "own.csv", rows))


@pytest.mark.parametrize("label", [-0.01, 1.01, 5])
def test_a_label_outside_the_range_names_the_row_of_the_file_and_the_option(tmp_path, label):
    rows = rows_of(30)
    rows[41]["label"] = label
    with pytest.raises(
        DataError, match=rf"own.csv: label {label}.* in row 41 is outside 0\.\.1.*--label-range"
    ):
        load(write(tmp_path / "own.csv", rows))


@pytest.mark.parametrize("count", [0, 1, 19])
def test_too_few_pairs_are_refused_with_their_number(tmp_path, count):
    lines = "".join(f"kite {n},drum {n},The shape.,1\n" for n in range(count))
    (tmp_path / "own.csv").write_text(HEADER + lines)
    with pytest.raises(DataError, match=f"{count} sentence pairs; at least 20 pairs are needed"):
        load(tmp_path / "own.csv")


def test_a_split_of_one_row_is_refused(tmp_path):
    with pytest.raises(DataError, match="own, train: 1 rows with 1 distinct labels; at least two rows"):
        load_split(tmp_path, rows_of(1)[:1])


def test_a_split_whose_labels_are_all_alike_is_refused(tmp_path):
    rows = [{**row, "label": 0.5} for row in rows_of(30)]
    with pytest.raises(DataError, match="own, train: 42 rows with 1 distinct labels"):
        load(write(tmp_path / "own.csv", rows))


@pytest.mark.parametrize("name", ["own.xlsx", "own.csv.gz", "own.json", "own"])
def test_another_file_type_is_refused_by_its_ending(tmp_path, name):
    (tmp_path / name).write_text(HEADER)
    with pytest.raises(DataError, match=r"expected a file ending in \.csv or \.parquet"):
        load(tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="absent.csv: no such file or folder"):
        load(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="absent.csv: no such file"):
        read_table(tmp_path / "absent.csv")


def test_an_empty_file_is_refused(tmp_path):
    for name in ("own.csv", "own.parquet"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            load(tmp_path / name)


def test_a_parquet_file_cut_anywhere_is_refused(tmp_path):
    whole = write(tmp_path / "whole.parquet", rows_of(200)).read_bytes()
    path = tmp_path / "own.parquet"
    for length in (1, 4, 11, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="own.parquet cannot be read; is it cut short"):
            load(path)


def test_a_parquet_file_with_a_flipped_bit_is_read_or_refused_but_never_crashes(tmp_path, capfd):
    whole = bytearray(write(tmp_path / "whole.parquet", rows_of(200)).read_bytes())
    path, rng, refused = tmp_path / "own.parquet", random.Random(3), 0
    for _ in range(40):
        place, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
        whole[place] ^= bit
        path.write_bytes(whole)
        try:
            load(path)
        except DataError:
            refused += 1
        whole[place] ^= bit
    capfd.readouterr()  # polars prints its own panics
    assert refused


def test_a_csv_in_another_encoding_is_refused(tmp_path):
    lines = "".join(f"kite {n},drum {n},Gr\u00f6\u00dfe,1\n" for n in range(20))
    (tmp_path / "own.csv").write_bytes((HEADER + lines).encode("latin-1"))
    with pytest.raises(DataError, match="own.csv cannot be read"):
        load(tmp_path / "own.csv")


def test_a_row_with_too_many_cells_is_refused(tmp_path):
    lines = "".join(f"kite {n},drum {n},The shape, and size,{n % 2}\n" for n in range(20))
    (tmp_path / "own.csv").write_text(HEADER + lines)
    with pytest.raises(DataError, match="own.csv cannot be read"):
        load(tmp_path / "own.csv")


@pytest.mark.parametrize("text", ["   ", "\u200b", "\u00a0\u2028", "\t\n"])
@pytest.mark.parametrize("column", COLUMNS[:3])
def test_a_text_that_shows_nothing_is_named_by_column_and_row(tmp_path, column, text):
    rows = rows_of(20)
    rows[9][column] = text
    with pytest.raises(DataError, match=f"{column} in row 9 is empty or only white space"):
        load(write(tmp_path / "own.parquet", rows))


def test_an_empty_condition_is_refused(tmp_path):
    rows = rows_of(20)
    rows[9]["condition"] = ""
    for name in ("own.parquet", "own.csv"):
        with pytest.raises(DataError, match="condition.* row 9"):
            load(write(tmp_path / name, rows))


def test_a_nul_is_refused_with_its_position(tmp_path):
    rows = rows_of(20)
    rows[2]["sentence2"] = "dr\x00um"
    with pytest.raises(DataError, match=r"sentence2 in row 2 holds the character U\+0000 at position 2"):
        load(write(tmp_path / "own.csv", rows))


def test_a_column_of_numbers_for_sentences_is_refused(tmp_path):
    rows = [{**row, "sentence1": number} for number, row in enumerate(rows_of(20))]
    with pytest.raises(DataError, match="sentence1 in row 0 must be text, got int"):
        load(write(tmp_path / "own.parquet", rows))


@pytest.mark.parametrize("bounds", [(1, 1), (5, 1), (0, float("inf")), (float("nan"), 1)])
def test_a_label_range_that_is_none_is_refused(bounds):
    with pytest.raises(ValidationError, match="label_range"):
        PairData(source="bundled", name="bundled", label_range=bounds)


def test_a_recipe_without_its_files_says_how_to_give_them():
    with pytest.raises(DataError, match="own is not shipped with the workbench; .*--data PATH"):
        load_pairs(PairData(source="files", name="own"))
