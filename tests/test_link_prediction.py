"""A trained graph model that is asked: predictions against a loop over entities, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load, save
from torch.nn import functional

from workbench.datasets.graphs import Graph, GraphData, load_graph
from workbench.errors import DataError, RunError
from workbench.link_prediction import LinkPredictor
from workbench.papers.hyper_cl_kg import GraphHead
from workbench.papers.hyper_cl_kg_settings import GraphModelSettings
from workbench.runs import Run, run_recipe
from workbench.store import EmbeddingStore
from workbench.training import seed_everything

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October"]
SEASONS = ["winter", "spring", "summer", "autumn"]
FOLLOWED, SEASON = "is followed by", "belongs to the season"
SIZE = 22
HEADS = {
    "low_rank": {"kind": "hyper", "rank": 4, "identity": True, "self_weight": True, "adapter": 8},
    "full": {"kind": "hyper", "bottleneck": 4, "start": "paper", "self_weight": True},
    "dot_product": {"kind": "hyper", "rank": 4, "unit_query": False, "self_weight": True},
    "one_hot": {"kind": "hyper", "rank": 4, "condition": "one_hot"},
    "hadamard": {"kind": "hadamard"},
    "concat": {"kind": "concat", "adapter": 8},
}
RECIPE = """
paper: hyper_cl_kg
title: A small graph
seeds: [0]
data: {source: files, name: own, path: PATH}
training: {epochs: 2, batch_size: 16, learning_rate: 2e-3}
reference: hadamard
resamples: 100
models:
  - {name: hadamard, kind: hadamard}
  - {name: hyper, kind: hyper, rank: 4, identity: true, self_weight: true, adapter: 8}
  - {name: one_hot, kind: hyper, rank: 2, condition: one_hot}
"""


@pytest.fixture(scope="module")
def triples() -> dict[str, list[tuple[str, str, str]]]:
    """Each day and month is followed by one, each month has its season; by the ids of the tables."""
    every = [(DAYS[day], "r0", DAYS[(day + 1) % 7]) for day in range(7)]
    every += [(MONTHS[month], "r0", MONTHS[month + 1]) for month in range(9)]
    every += [(MONTHS[month], "r1", SEASONS[((month + 1) // 3) % 4]) for month in range(10)]
    test = [("Sunday", "r0", "Monday"), ("June", "r1", "summer"), ("October", "r1", "autumn")]
    valid = [("Wednesday", "r0", "Thursday"), ("July", "r1", "summer")]
    return {"train": [one for one in every if one not in test + valid], "valid": valid, "test": test}


@pytest.fixture(scope="module")
def folder(triples, tmp_path_factory) -> Path:
    """The graph as CSV files."""
    folder = tmp_path_factory.mktemp("graph")
    about = [(name, "a day") for name in DAYS] + [(name, "a month") for name in MONTHS]
    about += [(name, None) for name in SEASONS]
    rows = [(name, name, text) for name, text in about] + [("woman", "May", None)]  # a name and no more
    pl.DataFrame(rows, schema=["id", "name", "description"], orient="row").write_csv(folder / "entities.csv")
    pl.DataFrame({"id": ["r0", "r1"], "name": [FOLLOWED, SEASON]}).write_csv(folder / "relations.csv")
    for split, found in triples.items():
        table = pl.DataFrame(found, schema=["head", "relation", "tail"], orient="row")
        table.write_csv(folder / f"{split}.csv")
    return folder


@pytest.fixture(scope="module")
def graph(folder) -> Graph:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workbench.datasets.graphs._log.warning", lambda *_: None)
        return load_graph(GraphData(source="files", name="own", path=str(folder)))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def store(encoder, cache):
    return EmbeddingStore(encoder, cache)


@pytest.fixture(scope="module")
def asked(graph, encoder, cache):
    """Untrained heads, their self-weights large enough to move a head."""
    built: dict[str, LinkPredictor] = {}

    def predictor(name: str) -> LinkPredictor:
        if name not in built:
            seed_everything(0)
            settings = GraphModelSettings(name=name, **HEADS[name])
            head = GraphHead(settings, 384, 4 if name == "one_hot" else 384)
            if head.adapter is not None:
                torch.nn.init.normal_(head.adapter[-1].weight, std=0.2)
            if settings.self_weight:
                head.generator.head.bias.data[0] = 20.0  # its scale is 0.1, but for start: paper
            built[name] = LinkPredictor(head, graph, encoder, cache)
        return built[name]

    return predictor


@torch.inference_mode()
def by_hand(one: LinkPredictor, store: EmbeddingStore, head: str, relation: str) -> list[float]:
    """Score every entity in turn, straight from the equations."""

    def adapted(text: str) -> torch.Tensor:
        plain = store.embed([text])[0]
        if one.head.adapter is None:
            return plain
        return functional.normalize(plain + one.head.adapter(plain * 384**0.5), dim=0)

    settings, entities = one.head.settings, one.graph.entities
    feature = store.embed([relation])[0] * 384**0.5
    if settings.condition == "one_hot":
        feature = torch.zeros(4)
        feature[one.graph.relations.index(relation)] = 2.0  # the root of four relations: unit variance
    start, off = adapted(head), 0.0
    if settings.kind == "hyper":
        weights = one.head.generator(feature[None])
        query = start @ weights.matrix("projection", 0)
        if settings.self_weight:
            off = max(0.0, weights.tensors["self_weight"].item())
    elif settings.kind == "hadamard":
        query = one.head.shared(start * 384**0.5) * one.head.gate(feature)
    else:
        query = one.head.joint(torch.cat([start * 384**0.5, feature]))
    if settings.unit_query:
        query = query / query.norm()
    return [float(query @ adapted(text)) - off * (text == head) for text in entities]


def check(found: pl.DataFrame, scores: list[float], entities: list[str]) -> None:
    order = sorted(range(len(scores)), key=lambda row: -scores[row])[: found.height]
    assert found["rank"].to_list() == list(range(1, found.height + 1))
    assert found["tail"].to_list() == [entities[row] for row in order]
    # Single precision; a dot product's size is that of its query.
    expected = pytest.approx([scores[row] for row in order], rel=1e-4, abs=1e-5)
    assert found["score"].to_list() == expected


# --- predictions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", [FOLLOWED, f"inverse {SEASON}"])
@pytest.mark.parametrize("head", ["Monday: a day", "summer"])
@pytest.mark.parametrize("name", HEADS)
def test_predictions_are_those_of_a_loop_over_all_entities(name, head, relation, asked, store, graph):
    scores = by_hand(asked(name), store, head, relation)
    for k in (1, 5, SIZE):
        check(asked(name).predict(head, relation, k), scores, graph.entities)


@pytest.mark.parametrize("name", ["low_rank", "full"])
def test_the_self_weight_keeps_a_head_from_answering_itself(name, asked):
    found = asked(name).predict("Monday", FOLLOWED, SIZE)
    assert found["tail"][-1] == "Monday: a day"
    assert found["score"][-1] < -0.5  # no cosine of like texts


def test_known_answers_of_all_three_splits_are_marked(asked, graph, triples):
    texts = dict(zip([*DAYS, *MONTHS, *SEASONS, "woman"], graph.entities, strict=True))
    names = {"r0": FOLLOWED, "r1": SEASON}
    every = [one for found in triples.values() for one in found]
    for head, relation, tail in every:
        for start, way, end in ((head, "", tail), (tail, "inverse ", head)):
            found = asked("low_rank").predict(texts[start], way + names[relation], SIZE)
            true = {one[2 if not way else 0] for one in every
                    if one[1] == relation and one[0 if not way else 2] == start}  # fmt: skip
            assert end in true
            assert set(found.filter("known")["tail"]) == {texts[one] for one in true}


def test_a_name_up_to_the_colon_stands_for_the_full_text(asked):
    one = asked("low_rank")
    for head in ("Monday", "  Monday\n", "Monday: a day "):
        assert one.predict(head, FOLLOWED, 5).equals(one.predict("Monday: a day", f" {FOLLOWED} ", 5))
    assert one.predict("Monday", f" {FOLLOWED} ", SIZE).filter("known")["tail"].to_list() == [
        "Tuesday: a day"
    ]


def test_an_entity_that_has_exactly_the_text_comes_before_one_of_that_name(asked, store, graph):
    # "May: a month" stands before "May", a woman's name.
    scores = by_hand(asked("low_rank"), store, "May", FOLLOWED)
    found = asked("low_rank").predict("May", FOLLOWED, SIZE)
    check(found, scores, graph.entities)
    assert not found["known"].any()
    assert asked("low_rank").predict("May: a month", FOLLOWED, SIZE)["known"].any()


@pytest.mark.parametrize("name", ["low_rank", "full", "hadamard", "concat"])
def test_heads_and_relations_of_ones_own_are_ranked_too(name, asked, store, graph):
    one = asked(name)
    for head, relation in (("the day after tomorrow", FOLLOWED), ("Friday: a day", "comes right before"),
                           ("a month of rain", "is as warm as")):  # fmt: skip
        found = one.predict(head, relation, SIZE)
        check(found, by_hand(one, store, head, relation), graph.entities)
        assert not found["known"].any()


def test_a_relation_known_by_number_cannot_be_of_ones_own(asked):
    listed = f"there are: {FOLLOWED}, {SEASON}, inverse {FOLLOWED}, inverse {SEASON}"
    with pytest.raises(DataError, match="unknown relation 'comes right before': this head knows .*" + listed):
        asked("one_hot").predict("Monday", "comes right before")
    asked("one_hot").predict("a month of rain", FOLLOWED)  # a head may be


def test_weights_of_relations_are_those_that_rank(asked, store):
    one = asked("full")
    weights = one.weights([FOLLOWED, "comes right before"])
    assert len(weights) == 2
    with torch.inference_mode():
        query = functional.normalize(store.embed(["summer"]) @ weights.matrix("projection", 1), dim=1)
        scores = (query @ one.entities.T)[0]
    found = one.predict("summer", "comes right before", SIZE)
    others = [row for row, text in enumerate(one.graph.entities) if text != "summer"]
    expected = sorted(scores[others].tolist(), reverse=True)
    assert found.filter(pl.col("tail") != "summer")["score"].to_list() == pytest.approx(expected, abs=1e-5)


# --- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (("Monday", FOLLOWED, 0), r"k must lie in 1\.\.22, the number of entities, got 0"),
        (("Monday", FOLLOWED, 23), r"k must lie in 1\.\.22, the number of entities, got 23"),
        ((" ", FOLLOWED, 3), "the head is empty or only white space"),
        (("Monday", "\n", 3), "the relation is empty or only white space"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(question, message, asked):
    for name in ("low_rank", "one_hot"):
        with pytest.raises(DataError, match=message):
            asked(name).predict(*question)


def test_weights_of_nothing_and_of_a_head_without_a_generator_are_refused(asked):
    with pytest.raises(DataError, match="model concat generates no weights"):
        asked("concat").weights([FOLLOWED])
    with pytest.raises(DataError, match="the relation is empty"):
        asked("low_rank").weights([FOLLOWED, ""])


# --- heads that a run kept ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(folder, one_encoder, tmp_path_factory) -> Run:
    """One finished run on the graph."""
    place = tmp_path_factory.mktemp("reports")
    (place / "own.yaml").write_text(RECIPE.replace("PATH", str(folder)))
    return run_recipe(str(place / "own.yaml"), out=place)


def check_ranks(run: Run, one: LinkPredictor, name: str) -> None:
    """Hold a model's filtered ranks of the test split against its predictions."""
    texts, relations, size = one.graph.entities, one.graph.relations, len(one.graph.entities)
    rows = run.scores.filter(model=name, split="test").to_dicts()
    for row in rows[:: max(1, len(rows) // 20)]:
        found = one.predict(texts[row["head"]], relations[row["relation"]], size)
        [own] = found.filter(tail=texts[row["tail"]]).to_dicts()
        assert own["known"]
        above = found.filter(pl.col("score") > own["score"], ~pl.col("known"))
        assert row["optimistic"] == 1 + above.height


@pytest.mark.parametrize("name", ["hadamard", "hyper", "one_hot"])
def test_a_kept_head_predicts_as_the_run_ranked(name, finished, graph, encoder):
    one = LinkPredictor.load(finished.folder / "models" / name, graph, encoder)
    check_ranks(finished, one, name)


def test_a_run_on_the_prepared_graph_opens_its_own_models(one_encoder, tmp_path, prepared):
    prepared("nations")
    changes = {
        "models": [{"name": "hyper", "kind": "hyper", "rank": 4, "self_weight": True}],
        "reference": "hyper",
        "data": {"source": "manifest", "name": "nations", "limit": 100},
    }
    run = run_recipe("hyper_cl_wn18rr_tiny", out=tmp_path, changes=changes)
    one = run.model("hyper")
    assert isinstance(one, LinkPredictor)
    assert len(one.graph.entities) == 14
    check_ranks(run, one, "hyper")
    with pytest.raises(RunError, match="kept no model 'cosine'; it has: hyper"):
        run.model("cosine")


@pytest.fixture
def kept(finished, tmp_path) -> Path:
    """A copy of a kept head that may be damaged."""
    return Path(shutil.copytree(finished.folder / "models" / "hyper", tmp_path / "hyper"))


def rewrite(folder: Path, **changes: object) -> None:
    card = folder / "head.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), **changes}))


def spoil_weights(folder: Path) -> None:
    tensors = load((folder / "head.safetensors").read_bytes())
    tensors.pop("log_scale")
    (folder / "head.safetensors").write_bytes(save(tensors))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "head.json").unlink(),
        lambda folder: (folder / "head.json").write_text("{"),
        lambda folder: (folder / "head.json").write_text("[]"),
        lambda folder: (folder / "head.json").write_text("{}"),
        lambda folder: (folder / "head.json").write_bytes(b"\xff"),
        lambda folder: rewrite(folder, width=64),
        lambda folder: rewrite(folder, settings={"name": "x", "kind": "magic"}),
        lambda folder: (folder / "head.safetensors").unlink(),
        lambda folder: (folder / "head.safetensors").write_bytes(b""),
        lambda folder: os.truncate(folder / "head.safetensors", 1000),
        spoil_weights,
    ],
)
def test_a_damaged_head_is_refused(damage, kept, graph, encoder):
    LinkPredictor.load(kept, graph, encoder)
    damage(kept)
    with pytest.raises(RunError, match="hyper holds no usable graph head: .*Train it again"):
        LinkPredictor.load(kept, graph, encoder)


@pytest.mark.parametrize("name", ["hyper", "one_hot"])
def test_a_head_trained_on_other_relations_is_refused(name, finished, graph, encoder):
    others = [*graph.relations[:1], "is colder than", *graph.relations[2:]]
    for relations in (others, graph.relations[::-1], graph.relations[:2]):
        other = Graph(graph.entities, relations, graph.triples)
        with pytest.raises(RunError, match="was trained on other relations than this graph has"):
            LinkPredictor.load(finished.folder / "models" / name, other, encoder)
