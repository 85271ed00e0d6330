"""Tables of a view: every number says where it comes from, and names in it stay text."""

from pathlib import Path

import polars as pl
import pytest

from workbench.runs import Run
from workbench.views.page import origin
from workbench.views.tables import TablePlace

FRAME = pl.DataFrame(
    {"name": ["one", "two"], "norm": [1.23456, 2.0], "count": [3, 4], "typed": [True, False]}
)


class Made(Run):
    """Stands for a finished run."""

    provenance = {"seeds": [7, 8, 9]}


def filled(frame=FRAME, **told):
    return placed(frame, **told).table


def placed(frame=FRAME, **told):
    place = TablePlace()
    place.show(frame, **told)
    return place


def test_every_number_and_header_says_how_it_is_computed_and_where_it_comes_from():
    table = filled(meanings={"norm": "Frobenius norm"}, origin="run r-1")
    assert set(table.formatters) == set(table.widths) == {"name", "norm", "count", "typed"}
    assert "norm: Frobenius norm; run r-1" in table.formatters["norm"].template
    assert table.header_tooltips["norm"] == "norm: Frobenius norm; run r-1"
    # A usual column is known without being told, and a table may say more of it.
    assert table.header_tooltips["count"] == "count: how many it is taken over; run r-1"
    assert filled(meanings={"count": "rows"}).header_tooltips["count"] == "count: rows"
    assert filled().header_tooltips["name"] == "name"


def test_a_number_names_its_row_by_the_rows_number_or_by_its_first_text():
    assert 'obj["name"] + ": " + ' in filled().formatters["norm"].template
    numbered = filled(FRAME.with_row_index("row"))
    assert '"row " + obj["row"] + ", " + ' in numbered.formatters["norm"].template
    assert "obj[" not in filled(FRAME.select("norm")).formatters["norm"].template


def test_a_headers_markup_is_escaped_and_a_template_cannot_be_left():
    hostile = '<img src=x onerror=alert(1)> %> <%= 1 %> "'
    table = filled(FRAME.rename({"norm": hostile}), origin=hostile)
    assert table.titles[hostile].startswith("&lt;img")
    assert "<img" not in table.header_tooltips[hostile]
    template = table.formatters[hostile].template
    # The two that belong to the template: the hover and the number.
    assert (template.count("<%"), template.count("%>")) == (2, 2)


def test_other_rows_bring_other_columns_and_keep_none_of_the_old():
    place = placed(origin="run r-1")
    place.show(pl.DataFrame({"text": ["a"], "value": [0.5]}))
    table = place.table
    assert set(table.formatters) == set(table.titles) == {"text", "value"}
    assert "r-1" not in table.header_tooltips["value"]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({}, "seeds 7, 8, 9; run r-1"),
        ({"model": "m", "kept": True}, "model m, seed 7; run r-1"),
        ({"model": "m", "rows": "12 pairs"}, "12 pairs; model m, seeds 7, 8, 9; run r-1"),
    ],
)
def test_an_origin_names_rows_model_seeds_and_run(told, said):
    assert origin(Made(Path("r-1")), **told) == said


# Panel calls pandas 3.1 in a way that pandas is about to drop; tables work.
@pytest.mark.filterwarnings("ignore:The inplace keyword")
def test_a_table_that_was_sorted_by_a_column_takes_rows_without_it():
    place = placed()
    place.table.sorters = [{"field": "norm", "dir": "asc"}, {"field": "count", "dir": "desc"}]
    place.show(FRAME.drop("norm"))
    assert place.table.sorters == [{"field": "count", "dir": "desc"}]
    assert list(place.table.value) == ["name", "count", "typed"]


def test_other_columns_or_words_make_a_table_anew_and_other_rows_do_not():
    place = placed(meanings={"norm": "Frobenius norm"}, origin="run r-1")
    first = place.table
    place.show(FRAME.with_columns(norm=pl.lit(7.0)), meanings={"norm": "Frobenius norm"}, origin="run r-1")
    assert place.table is first
    assert first.value["norm"].tolist() == [7.0, 7.0]
    for change in ({"origin": "run r-2"}, {"frame": FRAME.drop("typed")}, {"meanings": {"norm": "another"}}):
        before = place.table
        place.show(**{"frame": FRAME, "meanings": {}, "origin": "run r-1"} | change)
        assert place.table is not before


def test_the_chosen_row_is_selected_on_its_page_in_a_new_table_and_in_one_that_stays():
    frame = pl.DataFrame({"row": range(30), "value": [0.5] * 30})
    place = TablePlace()
    place.show(frame, 25)
    assert (place.table.selection, place.table.page) == ([25], 3)
    place.show(frame.reverse(), 25)
    assert (place.table.selection, place.table.page) == ([4], 1)
    place.choose(12)
    assert (place.table.selection, place.table.page) == ([12], 2)
    place.show(frame)
    assert place.table.selection == []
