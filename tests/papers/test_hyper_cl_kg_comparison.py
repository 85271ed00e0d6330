"""Hyper-CL on graphs: ranks, re-ranking, baselines and whole comparisons, against loops and hand counts."""

from collections import deque
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from workbench.datasets.graphs import Graph
from workbench.errors import RecipeError
from workbench.papers import hyper_cl_kg_comparison, load_recipe
from workbench.papers.hyper_cl_kg import (
    FrozenTexts,
    GraphHead,
    GraphLoss,
    Neighbourhood,
    Ranker,
)
from workbench.papers.hyper_cl_kg_comparison import compare, load_data
from workbench.papers.hyper_cl_kg_settings import GraphModelSettings, HyperCLGraphRecipe
from workbench.store import EmbeddingStore
from workbench.training import seed_everything

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October"]
SEASONS = ["winter", "spring", "summer", "autumn"]
NAMES = ["is followed by", "belongs to the season"]


@pytest.fixture(scope="module")
def graph() -> Graph:
    """7 days, 10 months and 4 seasons: each day and month is followed by one, each month has its season."""
    texts = [*DAYS, *MONTHS, *SEASONS]
    days = [(day, 0, (day + 1) % 7) for day in range(7)]
    months = [(7 + month, 0, 8 + month) for month in range(9)]
    seasons = [(7 + month, 1, 17 + ((month + 1) // 3) % 4) for month in range(10)]
    test = [(6, 0, 0), (10, 0, 11), (12, 1, 19), (15, 0, 16), (16, 1, 20)]  # October is in test alone
    valid = [(2, 0, 3), (9, 1, 18)]
    train = [one for one in [*days, *months, *seasons] if one not in test + valid]
    splits = {"train": train, "valid": valid, "test": test}
    relations = [*NAMES, *(f"inverse {name}" for name in NAMES)]
    return Graph(texts, relations, {name: torch.tensor(rows) for name, rows in splits.items()})


def recipe_of(**changes) -> HyperCLGraphRecipe:
    hyper = {"name": "hyper", "kind": "hyper", "rank": 4, "identity": True, "self_weight": True}
    content = {
        **{"name": "own", "paper": "hyper_cl_kg", "title": "A small graph"},
        "data": {"source": "manifest", "name": "own"},
        "seeds": (0, 1),
        "training": {"epochs": 2, "batch_size": 16, "learning_rate": 0.002},
        "models": (
            {"name": "frequency", "kind": "frequency"},
            {"name": "cosine", "kind": "cosine"},
            {"name": "hadamard", "kind": "hadamard", "adapter": 8},
            {**hyper, "against": "cosine", "pre_batch": 1, "both_ways": True},
        ),
        "rerank": {"hops": 2, "weight": 0.3},
        "resamples": 100,
    }
    return HyperCLGraphRecipe(**(content | changes))


def answers(asked: torch.Tensor) -> dict[tuple[int, int], set[int]]:
    found: dict[tuple[int, int], set[int]] = {}
    for head, relation, tail in asked.tolist():
        found.setdefault((head, relation), set()).add(tail)
    return found


def steps_from(graph: Graph, head: int) -> dict[int, int]:
    """Breadth-first search: how many triples of train lie between an entity and each it can reach."""
    steps, waiting = {head: 0}, deque([head])
    while waiting:
        here = waiting.popleft()
        for one, _, other in graph.triples["train"].tolist():
            for near, far in ((one, other), (other, one)):
                if near == here and far not in steps:
                    steps[far] = steps[here] + 1
                    waiting.append(far)
    return steps


def places(scores: list[float], tail: int, others: set[int]) -> tuple[int, int]:
    """First and last place of a tail among the candidates that are no other true answer."""
    left = [score for one, score in enumerate(scores) if one == tail or one not in others]
    return 1 + sum(one > scores[tail] for one in left), sum(one >= scores[tail] for one in left)


# --- ranks --------------------------------------------------------------------------------------------------


def ranker_of(graph: Graph, **settings) -> Ranker:
    """A model at its start on random embeddings of width 16."""
    seed_everything(0)
    entities = functional.normalize(torch.randn(len(graph.entities), 16))
    texts = FrozenTexts(entities, torch.randn(len(graph.relations), 16))
    head = GraphHead(GraphModelSettings(**{"name": "own", "kind": "hyper", **settings}), 16, 16)
    if head.adapter is not None:
        torch.nn.init.normal_(head.adapter[-1].weight)
    if head.settings.self_weight:
        head.generator.head.bias.data[0] = 20.0  # of a slot whose scale is 0.1: twice what a cosine can reach
    return Ranker.of(GraphLoss(head, texts, graph, None, 4).eval(), len(graph.relations))


@pytest.mark.parametrize("hops", [None, 2])
@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 3, "self_weight": True},
        {"identity": True, "self_weight": True, "adapter": 8, "unit_query": False},
        {"kind": "hadamard"},
        {"kind": "concat", "adapter": 8, "self_weight": True},
    ],
)
def test_ranks_are_those_of_a_loop_over_all_entities(graph, settings, filtered, hops):
    ranker = ranker_of(graph, **settings)
    asked = torch.cat([graph.queries("test"), torch.tensor([[3, 0, 3], [8, 1, 8]])])
    true = answers(torch.cat([graph.queries(split) for split in graph.triples]))
    near = Neighbourhood(graph, hops, 0.3) if hops else None
    found = ranker.ranks(asked, graph.known() if filtered else None, near)
    for row, (head, relation, tail) in enumerate(asked.tolist()):
        queries, own = ranker.queries(torch.tensor([head]), torch.tensor([relation]))
        scores = [float(queries[0] @ entity) for entity in ranker.entities]
        scores[head] -= float(own[0])
        if hops:
            steps = steps_from(graph, head)
            scores = [score + 0.3 * (steps.get(one, 99) <= hops) for one, score in enumerate(scores)]
        others = true.get((head, relation), set()) if filtered else set()
        assert (found.optimistic[row], found.pessimistic[row]) == places(scores, tail, others)


def test_an_asked_entity_is_adapted_before_it_is_mapped_and_compared(graph):
    plain, adapted = ranker_of(graph, rank=3), ranker_of(graph, rank=3, adapter=8)
    torch.testing.assert_close(adapted.entities.norm(dim=1), torch.ones(21))
    with torch.inference_mode():
        expected = adapted.head.adapt(plain.entities)
    torch.testing.assert_close(adapted.entities, expected, rtol=0, atol=1e-6)  # rows of a batched product
    assert not torch.allclose(adapted.entities, plain.entities, atol=0.1)


def test_the_self_weight_moves_the_head_alone(graph):
    ranker = ranker_of(graph, rank=3, identity=True, self_weight=True)
    every = torch.arange(21)
    for head, relation in ((0, 0), (8, 1), (20, 3)):
        asked = torch.stack([torch.full((21,), head), torch.full((21,), relation), every], 1)
        queries, own = ranker.queries(asked[:, 0], asked[:, 1])
        assert (own > 1).all()
        order = ranker.ranks(asked, None).optimistic.argsort().tolist()
        plain = (ranker.entities @ queries[0]).argsort(descending=True).tolist()
        assert order[-1] == head  # no cosine is low enough to stand behind it
        assert [one for one in plain if one != head] == order[:-1]


@pytest.mark.parametrize("hops", [1, 2, 3, 6])
def test_a_neighbourhood_is_what_a_breadth_first_search_reaches(hops):
    draw = torch.Generator().manual_seed(hops)
    ends = torch.randint(25, (20, 2), generator=draw)  # some entities without any triple
    train = torch.stack([ends[:, 0], torch.zeros(20, dtype=torch.int64), ends[:, 1]], 1)
    graph = Graph([""] * 25, ["", ""], {"train": torch.cat([train, train[:3]])})
    heads = torch.cat([torch.arange(25), torch.tensor([3, 3, 0])])
    block = torch.randn(28, 25, generator=draw)
    bonus = Neighbourhood(graph, hops, 0.25).add_to(block.clone(), heads) - block
    expected = [
        [0.25 * (steps_from(graph, head).get(one, 99) <= hops) for one in range(25)]
        for head in heads.tolist()
    ]
    torch.testing.assert_close(bonus, torch.tensor(expected), rtol=0, atol=1e-6)


# --- comparisons --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(encoder, tmp_path_factory):
    return EmbeddingStore(encoder, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def finished(graph, store, tmp_path_factory):
    """One finished comparison and its folder."""
    folder = tmp_path_factory.mktemp("run")
    return compare(recipe_of(), graph, store, folder, "cpu"), folder


def test_the_frequency_baseline_of_a_hand_case(finished):
    found = finished[0].scores.filter(model="frequency", split="test")
    ranks = {(row["head"], row["relation"], row["tail"]): (row["optimistic"], row["pessimistic"])
             for row in found.to_dicts()}  # fmt: skip
    # June, season, ?: train shows winter twice, spring twice, summer twice (July, August), autumn once: three
    # tie for the first places.
    assert ranks[12, 1, 19] == (1, 3)
    # October, season, ?: autumn once (September) comes after those three and before 17 that never occur.
    assert ranks[16, 1, 20] == (4, 4)
    # ?, season summer: July and August are known and left out. January, February, April, May and September
    # have a season in train; June, March (valid), October and the 11 days and seasons have none: 6 to 19.
    assert ranks[19, 3, 12] == (6, 19)


def test_untrained_models_rank_as_loops_do(finished, graph, store):
    embedded = store.embed(graph.entities)
    true = answers(torch.cat([graph.queries(split) for split in graph.triples]))
    train = graph.queries("train").tolist()
    for model in ("frequency", "cosine"):
        for row in finished[0].scores.filter(model=model).to_dicts():
            head, relation, tail = row["head"], row["relation"], row["tail"]
            if model == "frequency":
                scores = [sum(one[1:] == [relation, entity] for one in train) for entity in range(21)]
            else:
                scores = [float(embedded[head] @ entity) for entity in embedded]
            assert (row["optimistic"], row["pessimistic"]) == places(scores, tail, true[head, relation])
            assert row["seed"] is None


def test_every_model_is_measured_on_every_split_and_group(finished):
    metrics = finished[0].metrics
    assert set(metrics["model"]) == {"frequency", "cosine", "hadamard", "hyper"}
    plain = metrics.filter(pl.col("seed").is_null(), metric="mrr")
    for split, triples in (("valid", 2), ("test", 5)):
        for model in ("frequency", "hyper"):
            rows = plain.filter(split=split, model=model)
            counts = dict(rows.select("group", "count").iter_rows())
            expected = {"all": 2 * triples, "direction=tail": triples, "direction=head": triples}
            if split == "test":  # October is the head or the tail of two triples
                expected |= {"entity=seen": 6, "entity=unseen": 4}
            per_relation = {"valid": (2, 2), "test": (6, 4)}[split]
            expected |= {f"relation={name}": count for name, count in zip(NAMES, per_relation, strict=True)}
            if model == "hyper":
                expected["rerank=2 hops"] = 2 * triples
            assert counts == expected
            assert rows["group"].n_unique() == rows.height


def test_every_value_lies_in_its_interval_and_has_a_count(finished):
    metrics = finished[0].metrics
    assert metrics["count"].min() >= 2
    assert metrics.select(pl.col("value", "low", "high").is_finite().all()).row(0) == (True,) * 3
    # Rounding: in a group of one triple all three are the same.
    assert (metrics["low"] - 1e-9 <= metrics["value"]).all()
    assert (metrics["value"] <= metrics["high"] + 1e-9).all()


def test_metrics_are_means_over_the_ranks_of_the_table(finished, graph):
    comparison, folder = finished
    trained = set(graph.triples["train"][:, [0, 2]].flatten().tolist())
    seen = pl.col("head").is_in(trained) & pl.col("tail").is_in(trained)
    scores = comparison.scores.filter(split="test", model="hyper", seed=1)
    assert scores.select("head", "relation", "tail").to_numpy().tolist() == graph.queries("test").tolist()
    groups = {
        "all": pl.lit(True),
        "direction=tail": pl.col("relation") < 2,
        "direction=head": pl.col("relation") >= 2,
        **{"entity=seen": seen, "entity=unseen": ~seen},
        f"relation={NAMES[1]}": pl.col("relation") % 2 == 1,
    }
    found = comparison.metrics.filter(split="test", model="hyper", seed=1)
    for group, chosen in groups.items():
        rows = scores.filter(chosen)
        ranks = ((rows["optimistic"] + rows["pessimistic"]) / 2).to_numpy()
        value = dict(found.filter(group=group).select("metric", "value").iter_rows())
        assert value["mrr"] == pytest.approx((1 / ranks).mean())
        assert value["mr"] == pytest.approx(ranks.mean())
        assert value["hits_at_3"] == pytest.approx((ranks <= 3).mean())
        assert ("mrr_optimistic" in value) == ("mrr_pessimistic" in value) == (group == "all")
    kept = load_file(folder / "training" / "hyper-seed1" / "results.safetensors")
    again = (kept["test.rerank.optimistic"] + kept["test.rerank.pessimistic"]).double() / 2
    value = found.filter(group="rerank=2 hops", metric="mrr")["value"].item()
    assert value == pytest.approx((1 / again).mean().item())
    assert not torch.equal(kept["test.rerank.optimistic"], kept["test.optimistic"])


def test_a_mean_over_seeds_and_its_differences_to_both_baselines(finished):
    rows = finished[0].metrics.filter(split="test", group="all")
    value = {(row["model"], row["metric"], row["seed"]): row["value"] for row in rows.to_dicts()}
    mean = value["hyper", "mrr", None]
    assert mean == pytest.approx(np.mean([value["hyper", "mrr", seed] for seed in (0, 1)]))
    assert value["hyper", "mrr", 0] != value["hyper", "mrr", 1]
    for other in ("hadamard", "cosine"):  # the recipe's reference, and the model's own
        expected = mean - value[other, "mrr", None]
        assert value["hyper", f"mrr_minus_{other}", None] == pytest.approx(expected)
    assert ("hadamard", "mrr_minus_cosine", None) not in value


def test_finished_models_are_not_trained_again(finished, graph, store):
    first, folder = finished
    cards = sorted(folder.rglob("card.json"))
    assert len(cards) == 4  # two models under two seeds
    cards.pop().unlink()  # killed before this one was finished
    times = [card.stat().st_mtime_ns for card in cards]
    again = compare(recipe_of(), graph, store, folder, "cpu")
    assert [card.stat().st_mtime_ns for card in cards] == times
    assert again.scores.equals(first.scores)
    assert again.metrics.equals(first.metrics)
    assert sorted(path.parent.name for path in folder.rglob("head.safetensors")) == ["hadamard", "hyper"]
    assert not list(folder.rglob("checkpoint*"))


def test_cards_say_what_was_trained(finished):
    cards = finished[0].cards
    assert [card["seed"] for card in cards] == [None, None, 0, 1, 0, 1]
    assert [card["model"] for card in cards[::2]] == ["frequency", "hadamard", "hyper"]
    for card in cards[2:]:
        assert 0 < card["geometry"]["alignment"] < 2  # nearer than what points anywhere
        assert -8 < card["geometry"]["uniformity"] < 0
        assert card["geometry"]["split"] == "test"
    # (3) 384 x 8 + 8 and 8 x 384 + 384; shared and gate 384 x 384 + 384 each; the temperature.
    assert cards[2]["parameters"] == 384 * 8 + 8 + 8 * 384 + 384 + 2 * (384 * 384 + 384) + 1
    assert [entry["epoch"] for entry in cards[4]["history"]] == [1, 2]
    assert cards[4]["temperature"] == pytest.approx(0.05, rel=0.2)


def test_a_split_of_unseen_entities_alone_has_no_group_of_seen_ones(graph, store, tmp_path):
    unseen = replace(graph, triples={**graph.triples, "test": torch.tensor([[15, 0, 16], [16, 1, 20]])})
    models = ({"name": "cosine", "kind": "cosine"},)
    found = compare(recipe_of(models=models, reference="cosine"), unseen, store, tmp_path, "cpu").metrics
    assert {name for name in found.filter(split="test")["group"] if "entity" in name} == {"entity=unseen"}


def test_the_identity_of_the_data_follows_texts_and_triples(graph, monkeypatch):
    triples = {**graph.triples, "test": graph.triples["test"][:-1]}
    others = (graph, replace(graph, entities=[*graph.entities[:-1], "fall"]), replace(graph, triples=triples))
    waiting = iter(others)
    monkeypatch.setattr(hyper_cl_kg_comparison, "load_graph", lambda _: next(waiting))
    found = [load_data(recipe_of()) for _ in others]
    assert len({loaded.sha256 for loaded in found}) == 3
    assert found[0].counts == {
        "train": {"triples": 19}, "valid": {"triples": 2}, "test": {"triples": 5},
        "graph": {"entities": 21, "relations": 2},
    }  # fmt: skip


def test_the_tiny_recipe_runs_on_its_prepared_graph(store, tmp_path, prepared):
    prepared("nations")
    data = {"source": "manifest", "name": "nations", "limit": 100}
    recipe = load_recipe("hyper_cl_wn18rr_tiny", {"data": data})
    found = compare(recipe, load_data(recipe).content, store, tmp_path, "cpu").metrics
    rows = found.filter(pl.col("seed").is_null(), split="test", group="all", metric="mrr")
    assert set(rows["model"]) == {model.name for model in recipe.models}
    assert rows["value"].is_between(0, 1, closed="none").all()


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"kind": "hadamard", "rank": 4}, "rank and identity go with kind: hyper, not hadamard"),
        ({"kind": "concat", "identity": True}, "rank and identity go with kind: hyper, not concat"),
        ({"kind": "concat", "bottleneck": 4}, "bottleneck and start belong to a generator, and kind concat"),
        ({"kind": "hadamard", "start": "paper"}, "bottleneck and start belong to a generator"),
        ({"kind": "frequency", "adapter": 8}, "kind frequency is not trained and has no adapter"),
        ({"kind": "cosine", "condition": "one_hot"}, "kind cosine is not trained and has no condition"),
        (
            {"kind": "hyper", "self_weight": True, "self_negatives": False},
            "self_weight is learned from the head",
        ),
        ({"kind": "hyper", "rank": 0}, "rank"),
        ({"kind": "hyper", "pooling": "condition"}, "pooling"),
    ],
)
def test_model_settings_that_make_no_sense_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        GraphModelSettings(**{"name": "own", **model})


def test_a_generator_of_self_weights_alone_may_be_narrow():
    settings = GraphModelSettings(name="own", kind="hadamard", self_weight=True, bottleneck=3, start="paper")
    head = GraphHead(settings, 16, 16)
    # 16 x 16 + 16 before, then 16 x 3 + 3, then one number: 3 + 1.
    assert head.generator.cost()["generator_parameters"] == 16 * 16 + 16 + 16 * 3 + 3 + 3 + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "shared"}, r"reference or against: 'shared' is not one of the models \['frequency'"),
        ({"models": ({"name": "hadamard", "kind": "hadamard", "against": "no"},)}, "'no' is not one of"),
        ({"models": ({"name": "hadamard", "kind": "hadamard"},) * 2}, "every name once"),
        ({"models": ()}, "models"),
        ({"rerank": {"hops": 0}}, "hops"),
        ({"group_by": ("gender",)}, "group_by"),
        ({"resamples": 5}, "resamples"),
        ({"seeds": (0, 0)}, "every seed once"),
    ],
)
def test_recipe_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe_of(**changes)


def test_a_wrong_change_of_a_recipe_names_the_recipe_and_the_key():
    with pytest.raises(RecipeError, match="hyper_cl_wn18rr_tiny.*rerank"):
        load_recipe("hyper_cl_wn18rr_tiny", {"rerank": {"weight": 0.0}})
