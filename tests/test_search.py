"""Conditioned search: exact hits against encoding everything, the K-dimensional form, approximate search."""

import pytest
import torch

from workbench import search
from workbench.datasets import bundled
from workbench.encoders import TextEncoder
from workbench.errors import DataError
from workbench.model import HyperCL
from workbench.papers.hyper_cl import ConditionedHead
from workbench.papers.hyper_cl_settings import ModelSettings
from workbench.search import ConditionedIndex, Hits
from workbench.training import seed_everything

QUERIES = ["A grey seal rests on a rock while the tide comes in.", "Soup.", "Two herons stand in the river."]
COLOUR, SIZE = "The colour.", "The size."
HEADS = {
    "full": {"kind": "hyper", "bottleneck": 4},
    "low_rank": {"kind": "hyper", "rank": 6, "start": "paper"},
    "identity": {"kind": "hyper", "rank": 6, "identity": True},
    "not_unit": {"kind": "hyper", "rank": 6},
    "hadamard": {"kind": "hadamard"},
    "concat": {"kind": "concat"},
    "shared": {"kind": "shared"},
}
# Single precision, sums of 384 products in another order: a cosine's last bits.
CLOSE = {"rtol": 0, "atol": 5e-6}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """80 sentences, 20 of each domain."""
    return bundled.sentences()["sentence"].to_list()[::4]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model_of(encoder, cache):
    """Untrained heads on the real encoder; random weights tell conditions apart well enough."""

    def model(name: str, **settings) -> HyperCL:
        seed_everything(3)
        settings = ModelSettings(name=name, **(settings or HEADS[name]))
        head = ConditionedHead(settings, 384, 384)
        if head.generator is not None:
            torch.nn.init.normal_(head.generator.head.bias)  # weights that all conditions share, as trained
        unit = name != "not_unit"
        return HyperCL(head, encoder if unit else TextEncoder(unit=False), cache, unit)

    return model


@pytest.fixture(scope="module")
def index_of(model_of, texts):
    """An index of every head, built when first asked for."""
    built: dict[str, ConditionedIndex] = {}

    def index(name: str) -> ConditionedIndex:
        if name not in built:
            built[name] = ConditionedIndex(model_of(name), texts)
        return built[name]

    return index


# --- exact --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [COLOUR, f"  {SIZE}\n"])
@pytest.mark.parametrize("name", HEADS)
def test_exact_search_finds_what_encoding_all_documents_finds(name, condition, index_of, texts):
    index = index_of(name)
    every = index.model.similarity(QUERIES, texts, condition)
    for k in (1, 5, len(texts)):
        found, expected = index.search(QUERIES, condition, k), every.topk(k)
        torch.testing.assert_close(found.scores, expected.values, **CLOSE)
        assert torch.equal(found.rows, expected.indices)
        assert found.texts == [[texts[row] for row in rows] for rows in expected.indices.tolist()]


@pytest.mark.parametrize("name", [name for name in HEADS if name != "shared"])
def test_another_condition_gives_other_scores_from_the_same_index(name, index_of):
    index, plain = index_of(name), index_of(name).plain.clone()
    one, other = (index.search(QUERIES, condition, 10).scores for condition in (COLOUR, SIZE))
    assert not torch.allclose(one, other, atol=1e-3)
    assert torch.equal(index.plain, plain)


def test_a_shared_map_ranks_alike_under_every_condition(index_of):
    one, other = (index_of("shared").search(QUERIES, condition, 10) for condition in (COLOUR, SIZE))
    assert torch.equal(one.rows, other.rows)


@pytest.mark.parametrize("block", [1, 7, 79, 80, 1000])
@pytest.mark.parametrize("name", ["low_rank", "concat"])
def test_blocks_do_not_change_what_is_found(name, block, index_of, model_of, texts, monkeypatch):
    expected = index_of(name).search(QUERIES, COLOUR, 12)  # more than a block of 7 holds
    monkeypatch.setattr(search, "BLOCK", block)
    found = ConditionedIndex(model_of(name), texts).search(QUERIES, COLOUR, 12)
    torch.testing.assert_close(found.scores, expected.scores, **CLOSE)
    assert torch.equal(found.rows, expected.rows)


def test_a_document_given_twice_is_found_twice_beside_itself(model_of, texts):
    index = ConditionedIndex(model_of("low_rank"), [*texts[:10], texts[3]])
    found = index.search([texts[3]], COLOUR, 2)
    assert set(found.rows[0].tolist()) == {3, 10}
    torch.testing.assert_close(found.scores, torch.ones(1, 2), **CLOSE)


def test_a_condition_never_seen_before_is_searched_under(encoder, model_of, texts, tmp_path):
    # With an empty store: the condition is encoded in the middle of a search.
    index = ConditionedIndex(HyperCL(model_of("identity").head, encoder, tmp_path), texts[:5])
    asked = "How loud the neighbours are on Sundays."
    found = index.search(["Rain."], asked, 5)
    expected = index.model.similarity(["Rain."], texts[:5], asked)
    torch.testing.assert_close(found.scores, expected.topk(5).values, **CLOSE)


# --- once per condition, once per document ------------------------------------------------------------------


def test_norms_are_computed_once_per_condition(model_of, texts, monkeypatch):
    asked, whole = [], ConditionedIndex._norms_under
    monkeypatch.setattr(
        ConditionedIndex, "_norms_under", lambda self, one: asked.append(one) or whole(self, one)
    )
    index = ConditionedIndex(model_of("hadamard"), texts)
    for condition in (COLOUR, f" {COLOUR} ", COLOUR):
        index.search(QUERIES, condition, 3)
        index.search(QUERIES[:1], condition, 3, approximate=True)
    assert asked == [COLOUR]
    index.search(QUERIES, SIZE, 3)
    index.search(QUERIES, COLOUR, 3)
    assert asked == [COLOUR, SIZE]


def test_documents_are_embedded_when_the_index_is_built_and_never_again(model_of, texts, monkeypatch):
    model, asked = model_of("low_rank"), []
    embed = model.store.embed
    monkeypatch.setattr(model.store, "embed", lambda some: asked.extend(some) or embed(some))
    index = ConditionedIndex(model, texts)
    assert asked == texts
    for condition in (COLOUR, SIZE):
        index.search(QUERIES, condition)
    assert set(asked[len(texts) :]) == {*QUERIES, COLOUR, SIZE}
    assert len(index) == 80


# --- K numbers for D ----------------------------------------------------------------------------------------


def full_map(index: ConditionedIndex, condition: str) -> torch.Tensor:
    """The generated matrix A B in double precision, the scale of its inputs included."""
    weights = index.model.weights([condition]).tensors
    scale = 384**0.5 if index.model.unit else 1.0
    return scale * weights["projection.down"][0].double() @ weights["projection.up"][0].double()


@pytest.mark.parametrize("name", ["low_rank", "not_unit"])
def test_the_reduced_map_has_the_inner_products_of_the_full_one(name, index_of):
    index = index_of(name)
    for condition in (COLOUR, SIZE):
        reduced, plain = index.reduced_map(condition), index.plain.double()
        assert reduced.shape == (384, 6)
        short, full = plain @ reduced.double(), plain @ full_map(index, condition)
        size = full.norm(dim=1)
        # Only the map's entries are rounded to single precision, each by up to 6e-8 of itself.
        found = short @ short.T / (size[:, None] * size)
        torch.testing.assert_close(found, full @ full.T / (size[:, None] * size), rtol=0, atol=1e-6)


def test_factors_of_lower_rank_than_k_reduce_too(model_of, texts):
    index = ConditionedIndex(model_of("own", kind="hyper", rank=3), texts[:6])
    layer = index.head.generator.head
    # The last 3 x 384 coefficients are B, row by row: its rows made equal, so that B B^T has rank 1.
    with torch.no_grad():
        layer.weight[-3 * 384 :] = layer.weight[-384:].repeat(3, 1)
        layer.bias[-3 * 384 :] = layer.bias[-384:].repeat(3)
    assert torch.linalg.matrix_rank(index.model.weights([COLOUR]).tensors["projection.up"][0]) == 1
    short = index.plain.double() @ index.reduced_map(COLOUR).double()
    full = index.plain.double() @ full_map(index, COLOUR)
    size = full.norm(dim=1)
    # The hair of 1e-12 on the diagonal counts as its root, 1e-6, where nothing else is.
    torch.testing.assert_close(short @ short.T / size**2, full @ full.T / size**2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in HEADS if name not in ("low_rank", "not_unit")])
def test_heads_that_are_no_bare_low_rank_map_have_no_reduced_one(name, index_of):
    assert index_of(name).reduced_map(COLOUR) is None


# --- approximate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["low_rank", "hadamard", "concat"])
def test_approximate_search_is_exact_when_its_pool_holds_every_document(name, index_of):
    index = index_of(name)
    exact = index.search(QUERIES, COLOUR, 8)
    found = index.search(QUERIES, COLOUR, 8, approximate=True, pool=10)  # 8 x 10 = 80 documents
    torch.testing.assert_close(found.scores, exact.scores, **CLOSE)
    assert torch.equal(found.rows, exact.rows)
    assert found.texts == exact.texts
    assert index.recall(QUERIES, COLOUR, 8, pool=10) == 1.0


@pytest.mark.parametrize("pool", [1, 3, 200])
@pytest.mark.parametrize("k", [1, 7, 80])
def test_approximate_search_gives_true_scores_best_first_and_no_document_twice(k, pool, index_of, texts):
    index = index_of("concat")
    every = index.model.similarity(QUERIES, texts, SIZE)
    found = index.search(QUERIES, SIZE, k, approximate=True, pool=pool)
    torch.testing.assert_close(found.scores, every.gather(1, found.rows), **CLOSE)
    assert (found.scores.diff(dim=1) <= 0).all()
    assert all(len(set(rows)) == k for rows in found.rows.tolist())


def test_many_copies_of_one_text_do_not_leave_places_empty(model_of, texts):
    # The graph links the copies among themselves and loses the rest.
    index = ConditionedIndex(model_of("low_rank"), [*["Soup."] * 300, *texts[:40]])
    found = index.search(QUERIES, COLOUR, 340, approximate=True)
    assert all(sorted(rows) == list(range(340)) for rows in found.rows.tolist())
    assert found.scores.isfinite().all()


def test_recall_of_a_hand_case(index_of, monkeypatch):
    exact = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    found = torch.tensor([[3, 9, 0, 8], [7, 6, 5, 4]])  # 2 of 4, and 4 of 4 in another order
    monkeypatch.setattr(
        ConditionedIndex,
        "search",
        lambda *_, approximate=False, **__: Hits(torch.zeros(2, 4), found if approximate else exact, []),
    )
    assert index_of("low_rank").recall(QUERIES[:2], COLOUR, 4) == 6 / 8


# --- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "the index is empty: give at least one document to search in"),
        (["Soup.", " \n"], "document 1 is empty or only white space"),
    ],
)
def test_documents_that_cannot_be_searched_are_refused(documents, message, index_of):
    with pytest.raises(DataError, match=message):
        ConditionedIndex(index_of("low_rank").model, documents)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (([], COLOUR, 3), "no query to search with; give at least one"),
        ((["Soup.", ""], COLOUR, 3), "query 1 is empty or only white space"),
        ((QUERIES, "  ", 3), "the condition is empty or only white space"),
        ((QUERIES, COLOUR, 0), r"k must lie in 1\.\.80, the number of documents, got 0"),
        ((QUERIES, COLOUR, 81), r"k must lie in 1\.\.80, the number of documents, got 81"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(asked, message, index_of):
    for approximate in (False, True):
        with pytest.raises(DataError, match=message):
            index_of("low_rank").search(*asked, approximate=approximate)


def test_a_pool_of_no_candidates_is_refused(index_of):
    with pytest.raises(DataError, match="pool must be at least 1 candidate per wanted document, got 0"):
        index_of("low_rank").search(QUERIES, COLOUR, 3, approximate=True, pool=0)


@pytest.mark.parametrize("pooling", ["condition", "learned"])
def test_a_head_that_pools_tokens_anew_is_refused(pooling, model_of, texts):
    model = model_of("pooled", kind="shared", pooling=pooling)
    with pytest.raises(DataError, match="model pooled pools tokens under each condition, which no index"):
        ConditionedIndex(model, texts)
