"""Knowledge graphs: what is read, how entities are written, what is known, and what is refused."""

import logging
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from workbench.datasets.graphs import Graph, GraphData, KnownTails, load_graph
from workbench.errors import DataError

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=100, deadline=None, database=None)

TABLES = {
    "entities": [
        {"id": "e_oslo", "name": "Oslo", "description": "capital on a fjord"},
        {"id": "e_norway", "name": "Norway", "description": None},
        {"id": "e_krone", "name": "krone", "description": "a coin"},
        {"id": "e_fish", "name": None, "description": "an animal with gills"},
    ],
    "relations": [{"id": "r_in", "name": "lies in"}, {"id": "r_pays", "name": " pays with "}],
    "train": [
        {"head": "e_oslo", "relation": "r_in", "tail": "e_norway"},
        {"head": "e_norway", "relation": "r_pays", "tail": "e_krone"},
        {"head": "e_fish", "relation": "r_in", "tail": "e_norway"},
    ],
    "valid": [{"head": "e_oslo", "relation": "r_pays", "tail": "e_krone"}],
    "test": [{"head": "e_krone", "relation": "r_in", "tail": "e_norway"}],
}
LONG = " ".join(f"word{number}" for number in range(60))


def write(folder: Path, ending: str = "csv", **changed) -> Path:
    """Write the tables above, or others in their place; None leaves one out."""
    for name, rows in {**TABLES, **changed}.items():
        if rows is not None:
            frame = pl.DataFrame(rows, infer_schema_length=None)
            file = folder / f"{name}.{ending}"
            frame.write_csv(file) if ending == "csv" else frame.write_parquet(file)
    return folder


def load(folder: Path, **settings) -> Graph:
    return load_graph(GraphData(source="files", name="own", path=str(folder), **settings))


def triple(head: object, relation: object, tail: object) -> dict:
    return {"head": head, "relation": relation, "tail": tail}


# --- what is read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_ids_become_the_row_numbers_of_the_tables(tmp_path, ending):
    graph = load(write(tmp_path, ending))
    assert {split: found.tolist() for split, found in graph.triples.items()} == {
        "train": [[0, 0, 1], [1, 1, 2], [3, 0, 1]],
        "valid": [[0, 1, 2]],
        "test": [[2, 0, 1]],
    }
    assert all(found.dtype == torch.int64 for found in graph.triples.values())


def test_row_numbers_and_ids_give_the_same_graph(tmp_path):
    (tmp_path / "numbers").mkdir()
    numbers = write(
        tmp_path / "numbers",
        train=[triple(0, 0, 1), triple(1, 1, 2), triple(3, 0, 1)],
        valid=[triple(0, 1, 2)],
        test=[triple(2, "r_in", 1)],  # each column may be one or the other
    )
    one, other = load(numbers), load(write(tmp_path))
    assert one.entities == other.entities
    assert all(torch.equal(one.triples[split], other.triples[split]) for split in other.triples)


def test_ids_that_are_numbers_are_ids_and_not_row_numbers(tmp_path):
    folder = write(
        tmp_path,
        entities=[{"id": number, "name": name} for number, name in ((2, "two"), (1, "one"), (0, "nought"))],
        train=[triple(2, "r_in", 1)],
        valid=[triple(1, "r_in", 2)],
        test=[triple(0, "r_in", 1), triple(0, "r_in", 2)],
    )
    # Row 0 holds the id 2, row 1 the id 1, row 2 the id 0.
    assert load(folder).triples["test"].tolist() == [[2, 0, 1], [2, 0, 0]]


def test_names_that_look_like_numbers_are_texts(tmp_path):
    entities = [{"id": f"e{year}", "name": year, "description": year + 1} for year in (1984, 2001)]
    rows = {"train": [triple(0, 0, 1)], "valid": [triple(1, 0, 0)], "test": [triple(0, 0, 0)]}
    graph = load(write(tmp_path, entities=entities, relations=[{"id": "r", "name": 7}], **rows))
    assert graph.entities == ["1984: 1985", "2001: 2002"]
    assert graph.relations == ["7", "inverse 7"]


def test_a_parquet_table_may_stand_beside_csv_tables(tmp_path):
    write(tmp_path, entities=None)
    pl.DataFrame(TABLES["entities"]).write_parquet(tmp_path / "entities.parquet")
    assert len(load(tmp_path).entities) == 4


def test_a_limit_keeps_the_first_triples_of_every_split(tmp_path):
    graph = load(write(tmp_path), limit=1)
    assert graph.triples["train"].tolist() == [[0, 0, 1]]
    assert {len(found) for found in graph.triples.values()} == {1}


def test_the_prepared_graph_of_the_tiny_recipe_can_be_read(prepared):
    prepared("nations")
    graph = load_graph(GraphData(source="manifest", name="nations"))
    assert (len(graph.entities), len(graph.relations)) == (14, 2 * 55)
    assert all(found[:, [0, 2]].max() < 14 for found in graph.triples.values())


# --- texts --------------------------------------------------------------------------------------------------


def test_an_entity_is_written_as_its_name_and_description(tmp_path):
    assert load(write(tmp_path)).entities == [
        "Oslo: capital on a fjord",
        "Norway",
        "krone: a coin",
        "an animal with gills",
    ]


def test_a_description_is_cut_after_so_many_words(tmp_path):
    entities = [{**row, "description": LONG} for row in TABLES["entities"]]
    folder = write(tmp_path, entities=entities)
    assert load(folder, description_words=3).entities[2] == "krone: word0 word1 word2"
    # 40 words unless told, after the name.
    assert load(folder).entities[0] == f"Oslo: {' '.join(LONG.split()[:40])}"


def test_no_description_words_means_names_only(tmp_path):
    entities = [{**row, "name": row["name"] or "fish"} for row in TABLES["entities"]]
    assert load(write(tmp_path, entities=entities), description_words=0, neighbours=2).entities == [
        "Oslo",
        "Norway",
        "krone",
        "fish",
    ]


def test_a_table_without_descriptions_gives_names(tmp_path):
    entities = [{"id": row["id"], "name": row["id"][2:]} for row in TABLES["entities"]]
    assert load(write(tmp_path, entities=entities)).entities == ["oslo", "norway", "krone", "fish"]


def test_a_short_description_is_followed_by_train_neighbours_and_a_long_one_is_not(tmp_path):
    entities = [dict(row) for row in TABLES["entities"]]
    entities[0]["description"] = " ".join(LONG.split()[:20])
    entities[2]["description"] = " ".join(LONG.split()[:19])
    graph = load(write(tmp_path, entities=entities), neighbours=1, description_words=60)
    assert graph.entities[0] == f"Oslo: {entities[0]['description']}"  # 20 words are enough
    assert graph.entities[1] == "Norway: Oslo"  # the first of its neighbours Oslo, krone and the fish
    # Norway by train; Oslo only by valid, which no text may show.
    assert graph.entities[2] == f"krone: {entities[2]['description']} Norway"
    assert graph.entities[3] == "an animal with gills Norway"
    two = load(tmp_path, neighbours=3, description_words=60).entities[1]
    assert two == "Norway: Oslo krone"  # the fish has no name to add


def test_white_space_around_names_is_no_part_of_the_text(tmp_path):
    entities = [{**row, "name": "  x\t", "description": " a \n b "} for row in TABLES["entities"]]
    graph = load(write(tmp_path, entities=entities))
    assert graph.entities[0] == "x: a b"
    assert graph.relations[1] == "pays with"


# --- questions ----------------------------------------------------------------------------------------------


def test_every_triple_asks_for_its_tail_and_inversely_for_its_head(tmp_path):
    graph = load(write(tmp_path))
    assert graph.relations == ["lies in", "pays with", "inverse lies in", "inverse pays with"]
    # (0, 0, 1) also asks (1, 0 + 2, 0), and so on; the inverses stand in the second half.
    assert graph.queries("train").tolist() == [
        *([0, 0, 1], [1, 1, 2], [3, 0, 1]),
        *([1, 2, 0], [2, 3, 1], [1, 2, 3]),
    ]


def test_known_tails_of_a_graph_are_those_of_the_splits_asked_for(tmp_path):
    graph = load(write(tmp_path))
    # (?, lies in, Norway) and (?, pays with, krone), asked from the right side.
    asked = torch.tensor([1, 2]), torch.tensor([2, 3])

    def answers(known: KnownTails) -> list[tuple[int, int]]:
        return sorted(zip(*map(torch.Tensor.tolist, known.of_queries(*asked)), strict=True))

    assert answers(graph.known(("train",))) == [(0, 0), (0, 3), (1, 1)]
    assert answers(graph.known()) == [(0, 0), (0, 2), (0, 3), (1, 0), (1, 1)]


triples = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 6)), min_size=1, max_size=40
)


@quick
@given(triples, st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), max_size=20))
def test_known_tails_are_those_of_a_dictionary_of_sets(given_triples, asked):
    truth: dict[tuple[int, int], set[int]] = {}
    for head, relation, tail in given_triples:
        truth.setdefault((head, relation), set()).add(tail)
    known = KnownTails.of(torch.tensor(given_triples), 4).to("cpu")
    heads, relations = (torch.tensor([one[side] for one in asked], dtype=torch.int64) for side in (0, 1))
    rows, tails = known.of_queries(heads, relations)
    # As lists, so that a tail that came twice would be seen; unknown questions have no pairs.
    assert list(zip(rows.tolist(), tails.tolist(), strict=True)) == [
        (row, tail) for row, question in enumerate(asked) for tail in sorted(truth.get(question, ()))
    ]


def test_an_unknown_question_has_no_tails_and_a_triple_given_twice_counts_once():
    known = KnownTails.of(torch.tensor([[2, 1, 5], [2, 1, 5], [2, 1, 3]]), 2)
    # Smaller and larger than every key, and between them.
    rows, tails = known.of_queries(torch.tensor([0, 2, 9, 2]), torch.tensor([0, 1, 1, 0]))
    assert (rows.tolist(), tails.tolist()) == ([1, 1], [3, 5])


# --- what is refused ----------------------------------------------------------------------------------------


def changed(split: str, *rows: dict) -> dict:
    return {split: [*TABLES[split], *rows]}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"relations": None}, r"has no relations\.csv or relations\.parquet"),
        ({"entities": [{"id": "a", "title": "A"}]}, r"own, entities: needs the columns id and name.*title"),
        ({"relations": [{"name": "lies in"}]}, r"own, relations: needs the columns id and name"),
        ({"valid": [{"head": 0, "relation": 0}]}, r"own, valid: needs the columns head, relation, tail"),
        (
            changed("train", triple("e_oslo", "r_of", "e_krone")),
            r"own, train: row 3 has the relation 'r_of': no such relation in the table of relations \(2 rows",
        ),
        (
            changed("test", triple("e_oslo", "r_in", "e_rome")),
            r"own, test: row 1 has the tail 'e_rome': no such entity in the table of entities \(4 rows\)",
        ),
        ({"test": [triple(0, 0, 4)]}, r"own, test: row 0 has the tail 4: no such entity.*4 rows"),
        ({"test": [triple(-1, 0, 1)]}, r"own, test: row 0 has the head -1: no such entity"),
        ({"test": [triple(0, 2, 1)]}, r"own, test: row 0 has the relation 2: no such relation"),
        (changed("test", triple(None, "r_in", "e_oslo")), r"own, test: row 1 has the head None"),
        (
            changed("train", TABLES["train"][1], TABLES["train"][0]),
            r"own, train: 2 triples stand twice, the first in row 3; remove them",
        ),
        (
            changed("test", TABLES["train"][2]),
            r"own: the triple in row 1 of test also stands in train.*remove it from one of them",
        ),
        (
            changed("entities", {"id": "e_oslo", "name": "another", "description": None}),
            r"own, entities: the id 'e_oslo' stands in more than one row",
        ),
        (
            changed("relations", {"id": "r_in", "name": "inside"}),
            r"own, relations: the id 'r_in' stands in more than one row",
        ),
        (
            changed("entities", {"id": "e_void", "name": " ", "description": None}),
            r"own, entities: row 4 \('e_void'\) has neither a name nor a description.*Add one",
        ),
        (
            changed("relations", {"id": "r_void", "name": None}),
            r"own, relations: name in row 2 must be text, got NoneType",
        ),
    ],
)
def test_a_graph_that_cannot_be_used_is_refused(tmp_path, tables, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path, **tables))


def test_a_missing_folder_is_refused_with_what_it_should_hold(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder; give one with entities, relations, train"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("table", ["entities", "relations", "train", "valid", "test"])
def test_an_empty_table_is_refused_by_name(tmp_path, table):
    write(tmp_path)
    file = tmp_path / f"{table}.csv"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match=f"own, {table}: needs .* row; found"):
        load(tmp_path)


def test_names_only_refuses_an_entity_that_has_no_name(tmp_path):
    with pytest.raises(DataError, match=r"row 3 \('e_fish'\) has neither"):
        load(write(tmp_path), description_words=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "files"}, "path goes with source: files"),
        ({"source": "manifest", "path": "x"}, "path goes with source: files"),
        ({"source": "manifest", "limit": 0}, "limit"),
        ({"source": "manifest", "description_words": -1}, "description_words"),
        ({"source": "manifest", "neighbours": -1}, "neighbours"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        GraphData(name="own", **settings)


def test_test_triples_with_entities_that_train_never_shows_are_counted(tmp_path, caplog):
    entities = [*TABLES["entities"], {"id": "e_new", "name": "new", "description": None}]
    rows = changed("test", triple("e_new", "r_in", "e_oslo"), triple("e_fish", "r_pays", "e_new"))
    with caplog.at_level(logging.WARNING):
        load(write(tmp_path, entities=entities, **rows))
    assert [record.getMessage() for record in caplog.records] == [
        "own: 2 of 3 test triples name an entity that train never shows; they are ranked by text alone and "
        "reported apart as entity=unseen"
    ]


def test_a_graph_whose_test_entities_were_all_trained_warns_of_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load(write(tmp_path))
    assert not caplog.records
