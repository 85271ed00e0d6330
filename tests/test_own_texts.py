"""Texts that people bring: what is read, and that everything else is refused in one sentence."""

import io

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import DataError
from workbench.own_texts import MOST_BYTES, MOST_ROWS, pasted_texts, read_texts, vectors_of, without_vectors


def parquet(**columns):
    raw = io.BytesIO()
    pl.DataFrame(columns).write_parquet(raw)
    return raw.getvalue()


def test_columns_of_few_values_become_attributes_and_others_are_left_out():
    rows = "\n".join(f'"text, {row}",{"red" if row % 2 else "blue"},{row},' for row in range(30))
    frame = read_texts("own.CSV", f"text,colour,number,empty\n{rows}".encode())
    assert frame.columns == ["text", "colour"]  # 30 numbers are too many values, no value is too few
    assert frame["text"][3] == "text, 3"
    assert frame["colour"].to_list()[:2] == ["blue", "red"]


def test_numbers_that_look_like_numbers_stay_text():
    frame = read_texts("own.csv", b"text,kind\n007,true\n1e5,false\ntrue,true\n")
    assert frame["text"].to_list() == ["007", "1e5", "true"]
    assert frame["kind"].to_list() == ["true", "false", "true"]


def test_pasted_lines_are_texts_and_empty_lines_are_not():
    assert pasted_texts("one\n\n two \nthree\n")["text"].to_list() == ["one", "two", "three"]


def test_vectors_are_read_in_the_order_of_their_numbers_and_brought_to_norm_one():
    raw = parquet(text=["a", "b", "c"], v1=[4.0, 0.0, 1.0], v0=[3, 2, 0], kind=["x", "y", "x"])
    frame = read_texts("own.parquet", raw)
    # (3, 4) has norm 5, (2, 0) norm 2, (0, 1) norm 1
    np.testing.assert_allclose(vectors_of(frame), [[0.6, 0.8], [1, 0], [0, 1]], rtol=1e-6)
    assert without_vectors(frame).columns == ["text", "kind"]
    assert vectors_of(without_vectors(frame)) is None


@pytest.mark.parametrize(
    ("name", "raw", "complaint"),
    [
        ("own.xlsx", b"", "neither .csv nor .parquet"),
        ("own.npy", b"\x93NUMPY", "the columns text, v0, v1"),
        ("own.csv", b"x" * (MOST_BYTES + 1), "at most 5 MiB"),
        ("own.csv", b"sentence\na\nb\nc\n", "no column named text; its columns are: sentence"),
        ("own.csv", b"text\na\n", "has 1 rows, 3 to 20,000"),
        ("own.csv", b"text\n" + b"a\n" * (MOST_ROWS + 1), "more than 20,000 rows"),
        ("own.csv", b'text,kind\na,x\n" ",x\nb,y\n', "row 2 .* is empty"),
        ("own.csv", b"", "cannot be read as CSV"),
        ("own.csv", b"text\n\xff\xfe\nb\nc\n", "cannot be read as CSV"),
        ("own.parquet", b"PAR1 and nothing else", "cannot be read as PARQUET"),
        ("own.parquet", parquet(text=["a", "b", "c"], v0=[1.0] * 3, v2=[1.0] * 3), "not v0 to v1"),
        ("own.parquet", parquet(text=["a", "b", "c"], v0=[1.0, float("nan"), 3.0]), "infinite value"),
        ("own.parquet", parquet(text=["a", "b", "c"], v0=[1.0, None, 3.0]), "missing"),
        ("own.parquet", parquet(text=["a", "b", "c"], v0=["1", "x", "2"]), "something else than numbers"),
        ("own.parquet", parquet(text=[1, 2, 3]), "must be text, got int"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(name, raw, complaint):
    with pytest.raises(DataError, match=complaint) as said:
        read_texts(name, raw)
    assert "\n" not in str(said.value)
    assert len(str(said.value)) < 400


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["a.csv", "a.parquet"]), st.binary(max_size=200))
def test_no_bytes_make_it_fail_otherwise(name, raw):
    try:
        frame = read_texts(name, raw)
    except DataError:
        return
    assert frame.columns[0] == "text"
