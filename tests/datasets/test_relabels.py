"""Second labels of the validation rows: matched by row before the order is destroyed."""

import polars as pl
import pytest

from workbench.datasets.pairs import PairData, load_pairs
from workbench.errors import DataError


def folder_of(path, relabels: str):
    for split, start in (("train", 0), ("validation", 100)):
        rows = [
            {
                "sentence1": f"A kite, number {number // 2}.",
                "sentence2": f"Drum number {number // 2}.",
                "condition": ("The shape.", "The sound.")[number % 2],
                "label": 1 + number % 5,
            }
            for number in range(start, start + 20)
        ]
        pl.DataFrame(rows).write_csv(path / f"own_{split}.csv")
    (path / "own-val-reannotated.tsv").write_text(relabels)
    return PairData(source="files", name="own", path=str(path), label_range=(1, 5))


def lines_of(labels) -> str:
    return "uid\treannotated-label\r\n" + "".join(f"{row}\t{label}\r\n" for row, label in enumerate(labels))


def test_second_labels_follow_their_rows_and_invalid_ones_are_empty(tmp_path):
    labels = [1 + (7 * row) % 5 for row in range(20)]
    labels[3] = -1
    valid = load_pairs(folder_of(tmp_path, lines_of(labels)))["valid"]
    for row in valid.to_dicts():
        pair = int(row["sentence2"].removeprefix("Drum number ").removesuffix(".")) - 50
        place = 2 * pair + ("The shape.", "The sound.").index(row["condition"])
        expected = None if place == 3 else (labels[place] - 1) / 4  # 1..5 brought to 0..1
        assert row["relabel"] == expected
        assert row["label"] == ((100 + place) % 5) / 4


def test_without_such_a_file_there_are_no_second_labels(tmp_path):
    data = folder_of(tmp_path, lines_of([1] * 20))
    (tmp_path / "own-val-reannotated.tsv").unlink()
    assert "relabel" not in load_pairs(data)["valid"].columns


@pytest.mark.parametrize(
    ("content", "found"),
    [(lines_of([1] * 19), "19 rows"), ("uid\tscore\n" + "0\t1\n" * 20, r"\['uid', 'score'\]")],
)
def test_labels_that_do_not_fit_the_rows_are_refused(content, found, tmp_path):
    with pytest.raises(DataError, match=rf"own-val-reannotated\.tsv: expected .* 20 rows.*{found}"):
        load_pairs(folder_of(tmp_path, content))
