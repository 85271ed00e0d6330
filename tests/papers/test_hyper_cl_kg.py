"""Hyper-CL on graphs: what every trained model has to keep, on a small graph and the real encoder."""

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn import functional

from workbench.datasets.graphs import Graph, GraphData, load_graph
from workbench.hypernetworks.generators import standardise
from workbench.papers.hyper_cl_kg import FrozenTexts, GraphHead, GraphLoss, Ranker
from workbench.papers.hyper_cl_kg_settings import GraphModelSettings
from workbench.store import EmbeddingStore
from workbench.training import Training, fit, seed_everything

KINDS = {
    "full": {"kind": "hyper", "bottleneck": 4},
    "low_rank": {"kind": "hyper", "rank": 6},
    "identity": {"kind": "hyper", "rank": 8, "identity": True, "bottleneck": 4},
    "one_hot": {"kind": "hyper", "rank": 4, "condition": "one_hot"},
    "paper": {"kind": "hyper", "rank": 4, "start": "paper"},
    "dot_product": {"kind": "hyper", "rank": 4, "identity": True, "unit_query": False},
    "hadamard": {"kind": "hadamard"},
    "concat": {"kind": "concat"},
}
OPTIONS = {
    "plain": {},
    "adapter": {"adapter": 16},
    "self_weight": {"self_weight": True},
    "no_self": {"self_negatives": False},
    "random": {"random_negatives": 5},
    "pre_batch": {"pre_batch": 2},
    "both_ways": {"both_ways": True},
    "all": {"adapter": 16, "self_weight": True, "random_negatives": 5, "pre_batch": 1, "both_ways": True},
}
# Every option with one kind, and every kind with none and with all of them.
MODELS = {f"{kind}_{option}": (kind, option) for kind in KINDS for option in ("plain", "all")}
MODELS |= {f"identity_{option}": ("identity", option) for option in OPTIONS}
GENERATED = [
    name for name, (kind, option) in MODELS.items() if KINDS[kind]["kind"] == "hyper" or option == "all"
]

PLACES = """France Paris euro Europe, Japan Tokyo yen Asia, Kenya Nairobi shilling Africa, Norway Oslo krone
Europe, India Delhi rupee Asia, Egypt Cairo pound Africa, Poland Warsaw zloty Europe, Thailand Bangkok baht
Asia, Peru Lima sol America"""
COUNTRIES = [line.split() for line in PLACES.split(",")]
RELATIONS = {"capital": "has the capital", "money": "pays with", "continent": "lies on the continent"}
ABOUT = ("a country", "a city, the seat of a government", "the money of a country", "a continent")
TEST = [("Poland", "continent", "Europe"), ("Japan", "capital", "Tokyo"), ("Peru", "money", "sol")]
VALID = [("Norway", "continent", "Europe"), ("India", "money", "rupee"), ("Egypt", "capital", "Cairo")]


def model_of(name: str, **extra) -> GraphModelSettings:
    kind, option = MODELS[name]
    return GraphModelSettings(**{"name": name, **KINDS[kind], **OPTIONS[option], **extra})


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Graph:
    """9 countries, their capitals, money and continents: 31 entities; Tokyo and sol are in test only."""
    folder = tmp_path_factory.mktemp("graph")
    entities = {name: ABOUT[place] for row in COUNTRIES for place, name in enumerate(row)}
    triples = [(row[0], key, row[place]) for row in COUNTRIES for place, key in enumerate(RELATIONS, 1)]
    tables = {
        "entities": {"id": [*entities], "name": [*entities], "description": [*entities.values()]},
        "relations": {"id": [*RELATIONS], "name": [*RELATIONS.values()]},
    }
    splits = {"train": [one for one in triples if one not in VALID + TEST], "valid": VALID, "test": TEST}
    for split, rows in splits.items():
        tables[split] = dict(zip(("head", "relation", "tail"), zip(*rows, strict=True), strict=True))
    for name, table in tables.items():
        pl.DataFrame(table).write_csv(folder / f"{name}.csv")
    return load_graph(GraphData(source="files", name="countries", path=str(folder)))


@pytest.fixture(scope="module")
def looped(graph) -> Graph:
    """The graph with entities that answer their own question, and some questions with many answers."""
    more = [[0, 0, 0], [4, 0, 4], [3, 2, 3], [0, 2, 5], [0, 2, 6], [4, 2, 0], [8, 2, 4], [2, 0, 2]]
    return replace(
        graph, triples={**graph.triples, "train": torch.cat([graph.triples["train"], torch.tensor(more)])}
    )


@pytest.fixture(scope="module")
def store(encoder, tmp_path_factory):
    return EmbeddingStore(encoder, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def texts(graph, store):
    return FrozenTexts(store.embed(graph.entities), standardise(store.embed(graph.relations)))


def loss_of(
    settings: GraphModelSettings, graph: Graph, texts, *, seed: int = 0, batch: int = 21
) -> GraphLoss:
    """A model at its start, in evaluation mode."""
    seed_everything(seed)
    one_hot = torch.eye(6) * math.sqrt(6) if settings.condition == "one_hot" else None
    head = GraphHead(settings, 384, 6 if one_hot is not None else 384)
    return GraphLoss(head, texts, graph, one_hot, batch).eval()


def awake(loss: GraphLoss) -> GraphLoss:
    """Move what starts at zero, so that every part of a model acts."""
    seed_everything(1)
    if loss.head.adapter is not None:
        torch.nn.init.normal_(loss.head.adapter[-1].weight, std=0.02)
    if loss.head.settings.self_weight:
        loss.head.generator.head.bias.data[0] = 2.0  # of the first slot, whose scale is 0.1
    return loss


def trained(settings, graph, texts, folder, *, seed: int = 0, epochs: int = 10) -> GraphLoss:
    loss = loss_of(settings, graph, texts, seed=seed)
    fit(loss, loss, loss.count, Training(epochs=epochs, batch_size=21, learning_rate=1e-3), folder, seed=seed)
    return loss


# --- the contract of every trained kind ---------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_falls_in_20_steps_and_the_embeddings_stay_as_they_were(name, graph, texts, tmp_path):
    settings, before = model_of(name), [tensor.clone() for tensor in texts.buffers()]
    values = []
    for loss in (loss_of(settings, graph, texts), trained(settings, graph, texts, tmp_path)):
        assert loss.count == 42  # two questions for each of 21 triples: 20 steps are 10 epochs
        loss.past.fill_(-1)
        seed_everything(0)  # the same random negatives
        with torch.inference_mode():
            values.append(loss(torch.arange(42)).item())
    assert math.isfinite(values[1])
    assert values[1] < 0.97 * values[0]
    assert all(torch.equal(*both) for both in zip(texts.buffers(), before, strict=True))
    assert not any(name.startswith("texts") for name in loss.state_dict())


@pytest.mark.parametrize("name", ["full_all", "hadamard_plain"])
def test_the_same_seed_gives_the_same_numbers(name, graph, texts, tmp_path):
    settings = model_of(name)
    first, again, other = (
        torch.cat(
            [
                tensor.flatten()
                for tensor in trained(settings, graph, texts, tmp_path / str(n), seed=seed, epochs=2)
                .state_dict()
                .values()
            ]
        )
        for n, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_reaches_every_parameter(name, graph, texts):
    loss = awake(loss_of(model_of(name), graph, texts)).train()
    loss(torch.arange(42)).backward()
    for parameter, tensor in loss.named_parameters():
        assert tensor.grad is not None, parameter
        assert torch.isfinite(tensor.grad).all(), parameter
        assert tensor.grad.abs().max() > 0, parameter


@pytest.mark.parametrize("name", GENERATED)
def test_another_relation_gives_other_weights(name, graph, texts):
    loss = loss_of(model_of(name), graph, texts)
    weights = loss.head.generator(loss.relation_features(torch.arange(6)))
    for slot in weights.spec.slots:
        distances = weights.distances(slot.name) + torch.eye(6)
        assert (distances > 1e-3 * weights.norms(slot.name).mean()).all()


@pytest.mark.parametrize("name", ["full_all", "paper_plain", "hadamard_all", "concat_plain"])
def test_another_relation_text_gives_another_query_and_the_same_text_the_same(name, texts, store):
    words = ["has the capital", "is ruled from the city", "has the capital"]
    other = FrozenTexts(texts.entities, standardise(store.embed(words)))
    head = loss_of(model_of(name), Graph([""] * 31, words, {"train": torch.zeros(1, 3).long()}), other).head
    found = Ranker(texts.entities, other.relations, head).queries(torch.tensor([0, 0, 0]), torch.arange(3))[0]
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-5)  # rows of a batched product
    assert functional.cosine_similarity(found[0], found[1], dim=0) < 0.999


# --- the equations ------------------------------------------------------------------------------------------


def by_hand(loss: GraphLoss) -> tuple[torch.Tensor, dict[tuple[int, int], torch.Tensor], torch.Tensor]:
    """All entities, the query of every (head, relation), and b_r of (4), with matrices formed."""
    head, settings = loss.head, loss.head.settings
    entities = loss.texts.entities
    if settings.adapter:  # (3)
        first, _, _, last = head.adapter
        hidden = functional.gelu(entities * math.sqrt(384) @ first.weight.T + first.bias)
        entities = functional.normalize(entities + hidden @ last.weight.T + last.bias)
    asked = loss.relation_features(torch.arange(6))
    weights = head.generator(asked) if head.generator is not None else None
    queries = {}
    for relation in range(6):
        if settings.kind == "hyper":  # (1)
            mapped = entities @ weights.matrix("projection", relation)
        elif settings.kind == "hadamard":
            gate = head.gate.weight @ asked[relation] + head.gate.bias
            mapped = (entities * math.sqrt(384) @ head.shared.weight.T + head.shared.bias) * gate
        else:
            both = torch.cat([entities * math.sqrt(384), asked[relation].expand(len(entities), -1)], 1)
            mapped = both @ head.joint.weight.T + head.joint.bias
        if settings.unit_query:
            mapped = functional.normalize(mapped)
        queries |= {(entity, relation): row for entity, row in enumerate(mapped)}
    own = torch.zeros(6)
    if settings.self_weight:  # (4)
        own = weights.tensors["self_weight"][:, 0].clamp_min(0)
    return entities, queries, own


def true_tails(asked: torch.Tensor) -> dict[tuple[int, int], set[int]]:
    found: dict[tuple[int, int], set[int]] = {}
    for head, relation, tail in asked.tolist():
        found.setdefault((head, relation), set()).add(tail)
    return found


def equation_2(loss: GraphLoss, items: torch.Tensor, more: set[int]) -> float:
    """The loss of a batch, question by question; more: negatives beside those of the batch."""
    settings, true = loss.head.settings, true_tails(loss.queries)
    entities, queries, own = by_hand(loss)
    batch = [tuple(row) for row in loss.queries[items].tolist()]

    def logit(question: tuple[int, int, int], candidate: int) -> float:
        head, relation, tail = question
        score = (queries[head, relation] @ entities[candidate]).item()
        score -= own[relation].item() * (candidate == head) + settings.margin * (candidate == tail)
        return score * math.exp(loss.head.log_scale.item())

    def allowed(question: tuple[int, int, int], candidate: int) -> bool:
        head, relation, tail = question
        if candidate == tail:
            return True
        return candidate not in true[head, relation] and (settings.self_negatives or candidate != head)

    def softmax_loss(logits: dict, gold: object) -> float:
        return math.log(sum(math.exp(value) for value in logits.values())) - logits[gold]

    terms, turned = [], []
    for number, question in enumerate(batch):
        candidates = (
            {tail for _, _, tail in batch} | more | ({question[0]} if settings.self_negatives else set())
        )
        logits = {one: logit(question, one) for one in candidates if allowed(question, one)}
        terms.append(softmax_loss(logits, question[2]))
        # The tail's own question, and those of the batch that it does not answer.
        tail = question[2]
        logits = {
            other: logit(asking, tail)
            for other, asking in enumerate(batch)
            if other == number or (tail not in true[asking[:2]] and allowed(asking, tail))
        }
        turned.append(softmax_loss(logits, number))
    return np.mean(terms + turned if settings.both_ways else terms)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        *((name, {}) for name in MODELS),
        ("identity_no_self", {"both_ways": True}),
        ("identity_plain", {"margin": 0.3, "temperature": 0.5}),
    ],
)
def test_the_loss_is_that_of_equation_2_over_a_batch_without_known_answers(name, extra, looped, texts):
    loss = awake(loss_of(model_of(name, **extra), looped, texts))
    draw = torch.Generator().manual_seed(3)
    loops = (loss.queries[:, 0] == loss.queries[:, 2]).nonzero()[:, 0]
    assert len(loops) == 8
    batches = [torch.randperm(loss.count, generator=draw)[:size] for size in (1, 6, 6, 9)]
    batches += [torch.arange(loss.count), loops, torch.tensor([*loops[:2], 0, 1, 2])]
    for items in batches:
        past = torch.randint(31, loss.past.shape, generator=draw)
        loss.past.copy_(past)
        seed_everything(7)
        drawn = torch.randint(31, (loss.head.settings.random_negatives,))
        seed_everything(7)
        with torch.inference_mode():
            found = loss(items).item()
            expected = equation_2(loss, items, {*past.tolist(), *drawn.tolist()})
        # Single precision, in another order, times 1 / tau = 20.
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_known_answer_does_not_enter_the_loss_and_an_unknown_one_does(looped, texts):
    loss = loss_of(model_of("identity_pre_batch"), looped, texts)
    question = torch.tensor([0])
    head, relation, tail = loss.queries[0].tolist()
    known = true_tails(loss.queries)[head, relation] - {tail}
    assert known == {0}
    with torch.inference_mode():
        alone = loss(question)
        loss.past[0] = 0  # known, and the head of its own question too
        assert loss(question) == alone
        loss.past[0] = 9
        assert loss(question) > alone + 1e-6


@pytest.mark.parametrize("self_negatives", [True, False])
def test_the_head_is_one_negative_of_its_question_or_none(self_negatives, graph, texts):
    loss = loss_of(model_of("identity_pre_batch", self_negatives=self_negatives), graph, texts)
    question, head = torch.tensor([0]), loss.queries[0, 0]
    with torch.inference_mode():
        alone = loss(question).item()
        loss.past[:3] = head  # a candidate three times over
        assert loss(question).item() == pytest.approx(alone, abs=1e-5)
        if not self_negatives:
            assert alone == pytest.approx(0, abs=1e-6)  # one candidate: nothing to tell it from


def test_a_margin_lowers_the_score_of_the_true_tail_alone(graph, texts):
    question = torch.tensor([3])
    with torch.inference_mode():
        plain, narrow = (
            loss_of(model_of("identity_random", margin=margin, temperature=0.1), graph, texts)
            for margin in (0, 0.2)
        )
        values = []
        for loss in (plain, narrow):
            seed_everything(5)
            values.append(loss(question).item())
    # p of the tail becomes p e^-2 / (1 - p + p e^-2), as 0.2 / 0.1 = 2.
    share = math.exp(-values[0])
    lowered = share * math.exp(-2)
    assert values[1] == pytest.approx(-math.log(lowered / (1 - share + lowered)), rel=1e-4)


def test_the_tails_of_the_last_batches_are_kept_newest_first(graph, texts):
    loss = loss_of(model_of("identity_pre_batch"), graph, texts, batch=4).train()
    assert loss.past.tolist() == [-1] * 8
    batches = torch.arange(12).split(4)
    for items in batches:
        loss(items)
    tails = loss.queries[:, 2]
    assert loss.past.tolist() == [*tails[batches[2]].tolist(), *tails[batches[1]].tolist()]
    loss.eval()(batches[0])
    assert loss.past.tolist() == [*tails[batches[2]].tolist(), *tails[batches[1]].tolist()]


def test_a_resumed_training_ends_with_the_same_weights(graph, texts, tmp_path):
    settings = model_of("identity_all", dropout=0.3)
    training = Training(epochs=2, batch_size=11, learning_rate=1e-3)

    def run(folder, stop_at: int | None) -> dict[str, torch.Tensor]:
        loss, calls = loss_of(settings, graph, texts, batch=11), []

        def step(items: torch.Tensor) -> torch.Tensor:
            calls.append(len(items))
            if len(calls) == stop_at:
                raise ConnectionAbortedError
            return loss(items)

        fit(loss, step, loss.count, training, tmp_path / folder, seed=0, checkpoint_seconds=0.0)
        assert len(calls) == (8 if folder == "whole" else 3)
        return loss.state_dict()

    whole = run("whole", None)
    with pytest.raises(ConnectionAbortedError):
        run("parts", stop_at=6)  # in the second epoch, after five steps
    parts = run("parts", None)
    assert (whole["past"] >= 0).all()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
