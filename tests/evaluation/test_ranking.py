"""Ranks against hand counts, full sorts and pykeen; intervals against arithmetic."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.datasets.graphs import Graph
from workbench.evaluation import ranking
from workbench.evaluation.ranking import METRICS, Ranks, count_ranks, dot_scores, metric_values, resample

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=100, deadline=None, database=None)


def ranks_of(scores: torch.Tensor, gold: torch.Tensor, known: list[list[int]] | None = None) -> Ranks:
    """Rank the rows of a matrix; known lists the true candidates of each row."""

    def true(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [(row, one) for row, some in enumerate(known[rows]) for one in some]
        return tuple(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1))

    filtered = true if known is not None else None
    return count_ranks(lambda rows: scores[rows].clone(), gold, scores.shape[1], filtered)


# --- ranks --------------------------------------------------------------------------------------------------

#                       0    1    2    3    4    5
SCORES = torch.tensor([[0.9, 0.5, 0.5, 0.7, 0.5, 0.1],
                       [0.2, 0.2, 0.2, 0.2, 0.2, 0.2],
                       [0.1, 0.9, 0.3, 0.4, 0.9, 0.0]])  # fmt: skip
GOLD = torch.tensor([2, 0, 5])


def test_ranks_of_a_hand_case_with_ties():
    found = ranks_of(SCORES, GOLD)
    # Row 0: 0.9 and 0.7 above, 0.5 three times: places 3 to 5. Row 1: six equal: 1 to 6. Row 2: last, alone.
    assert found.optimistic.tolist() == [3, 1, 6]
    assert found.pessimistic.tolist() == [5, 6, 6]
    assert found.realistic.tolist() == [4.0, 3.5, 6.0]


def test_filtered_ranks_of_a_hand_case_leave_other_true_answers_out():
    found = ranks_of(SCORES, GOLD, known=[[0, 4, 2], [0], [1, 4, 3]])
    # Row 0 without 0.9 and one tie: one above, places 2 and 3. Row 1: nothing left out. Row 2 loses three.
    assert found.optimistic.tolist() == [2, 1, 3]
    assert found.pessimistic.tolist() == [3, 6, 3]
    assert found.realistic.tolist() == [2.5, 3.5, 3.0]


def test_the_true_candidate_stays_however_the_filter_names_it():
    everything = [list(range(6))] * 3
    found = ranks_of(SCORES, GOLD, everything)
    assert found.optimistic.tolist() == found.pessimistic.tolist() == [1, 1, 1]
    without = [[one for one in range(6) if one != gold] for gold in GOLD.tolist()]
    assert torch.equal(ranks_of(SCORES, GOLD, without).pessimistic, found.pessimistic)


def test_a_true_candidate_without_a_score_is_refused():
    scores = SCORES.clone()
    scores[1, 0] = float("nan")
    with pytest.raises(ValueError, match="score of the true candidate of a query.*is NaN"):
        ranks_of(scores, GOLD)
    with pytest.raises(ValueError, match="is NaN"):
        ranks_of(scores, GOLD, [[0], [0], [1]])


@pytest.mark.parametrize("rows_per_block", [0, 1, 2, 5, 7, 100])
def test_blocks_do_not_change_ranks(monkeypatch, rows_per_block):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (13, 9), generator=generator).float()
    gold = torch.randint(0, 9, (13,), generator=generator)
    known = [torch.randint(0, 9, (row % 4,), generator=generator).tolist() for row in range(13)]
    whole, seen = ranks_of(scores, gold, known), []
    # Single precision: 4 bytes a score; a block is never smaller than a row.
    monkeypatch.setattr(ranking, "BLOCK_BYTES", 4 * 9 * rows_per_block)

    def block(rows: slice) -> torch.Tensor:
        seen.append(rows)
        return scores[rows].clone()

    plain = count_ranks(block, gold, 9)
    assert torch.equal(plain.pessimistic, ranks_of(scores, gold).pessimistic)
    assert [row for rows in seen for row in range(rows.start, rows.stop)] == list(range(13))
    assert seen[0].stop == min(max(1, rows_per_block), 13)
    parts = ranks_of(scores, gold, known)
    assert torch.equal(parts.optimistic, whole.optimistic)
    assert torch.equal(parts.pessimistic, whole.pessimistic)


@st.composite
def questions(draw):
    candidates = draw(st.integers(1, 12))
    one = st.integers(0, candidates - 1)
    # Few scores, so that many tie.
    row = st.tuples(
        st.lists(st.integers(-2, 2), min_size=candidates, max_size=candidates), one, st.lists(one)
    )
    return draw(st.lists(row, min_size=1, max_size=8))


@quick
@given(questions())
def test_ranks_are_the_places_in_a_full_sort(rows):
    scores, gold, known = zip(*rows, strict=True)
    found = ranks_of(torch.tensor(scores, dtype=torch.float32), torch.tensor(gold), list(known))
    for row, (values, own, true) in enumerate(rows):
        left = [value for one, value in enumerate(values) if one == own or one not in true]
        order = sorted(left, reverse=True)
        places = [place + 1 for place, value in enumerate(order) if value == values[own]]
        assert found.optimistic[row] == places[0]
        assert found.pessimistic[row] == places[-1]
        assert found.realistic[row] == np.mean(places)


def test_dot_scores_are_inner_products_block_by_block():
    generator = torch.Generator().manual_seed(0)
    queries, candidates = (torch.randn(rows, 3, generator=generator) for rows in (5, 4))
    scores = dot_scores(queries, candidates)(slice(1, 3))
    expected = [[sum(a * b for a, b in zip(query, one, strict=True)) for one in candidates.tolist()]
                for query in queries[1:3].tolist()]  # fmt: skip
    torch.testing.assert_close(scores, torch.tensor(expected))


def test_ranks_and_metrics_are_those_of_pykeen(monkeypatch, tmp_path):
    monkeypatch.setenv("PYSTOW_HOME", str(tmp_path))  # pykeen makes folders when it is imported
    pytest.importorskip("pykeen", reason="pykeen, the independent reference of ranks, is not installed")
    from pykeen.evaluation import RankBasedEvaluator
    from pykeen.models import DistMult
    from pykeen.triples import CoreTriplesFactory

    generator = torch.Generator().manual_seed(0)
    every = torch.cartesian_prod(torch.arange(12), torch.arange(3), torch.arange(12))
    chosen = every[torch.randperm(len(every), generator=generator)[:120]]
    splits = {"train": chosen[:80], "valid": chosen[80:95], "test": chosen[95:]}
    factory = CoreTriplesFactory(splits["train"], num_entities=12, num_relations=3)
    model = DistMult(triples_factory=factory, embedding_dim=4, random_seed=0).eval()
    # Whole numbers: exact products in any order, and many ties.
    entities = torch.randint(-1, 2, (12, 4), generator=generator).float()
    relations = torch.randint(1, 3, (3, 4), generator=generator).float()
    for part, values in (
        (model.entity_representations, entities),
        (model.relation_representations, relations),
    ):
        part[0]._embeddings.weight.data.copy_(values)
    evaluator = RankBasedEvaluator(filtered=True, clear_on_finalize=False)
    expected = evaluator.evaluate(
        model,
        splits["test"],
        additional_filter_triples=[splits["train"], splits["valid"]],
        batch_size=7,
        use_tqdm=False,
    )

    graph = Graph([""] * 12, [""] * 6, splits)
    asked = graph.queries("test")
    heads, relation, tails = asked.unbind(1)
    known = graph.known()
    # DistMult is symmetric: an inverse question multiplies by the same relation.
    found = count_ranks(
        dot_scores(entities[heads] * relations[relation % 3], entities),
        tails,
        12,
        lambda rows: known.of_queries(heads[rows], relation[rows]),
    )
    assert (found.optimistic < found.pessimistic).sum() > 10  # there are ties to break
    for way in ("optimistic", "pessimistic", "realistic"):
        ranks = getattr(found, way).double().numpy()
        theirs = np.concatenate([*evaluator.ranks["tail", way], *evaluator.ranks["head", way]])
        np.testing.assert_array_equal(ranks, theirs)
        values = metric_values(ranks)
        for ours, name in (
            ("mrr", "inverse_harmonic_mean_rank"),
            ("mr", "arithmetic_mean_rank"),
            ("hits_at_1", "hits_at_1"),
            ("hits_at_3", "hits_at_3"),
            ("hits_at_10", "hits_at_10"),
        ):
            # pykeen keeps ranks in single precision.
            assert values[ours].mean() == pytest.approx(expected.get_metric(f"both.{way}.{name}"), rel=1e-6)


# --- metrics and intervals ----------------------------------------------------------------------------------


def test_metrics_of_a_hand_case():
    values = metric_values(np.array([[1.0, 3.0, 3.5, 10.0, 11.0], [2.0, 1.0, 1.5, 100.0, 4.0]]))
    assert set(values) == set(METRICS)
    # Half places lie between whole ones: 3.5 is no hit at 3.
    assert values["hits_at_1"].tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    assert values["hits_at_3"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert values["hits_at_10"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]
    # (1 + 3 + 3.5 + 10 + 11) / 5 and 1 + 1/3 + 2/7 + 1/10 + 1/11.
    assert values["mr"][0].mean() == pytest.approx(5.7)
    np.testing.assert_allclose(values["mrr"][0], [1, 1 / 3, 2 / 7, 1 / 10, 1 / 11])


@quick
@given(st.lists(st.integers(2, 60), min_size=1, max_size=20))
def test_metrics_stay_in_their_range_and_a_better_rank_is_never_worse(doubled):
    ranks = np.array(doubled) / 2
    values, better = metric_values(ranks), metric_values(np.maximum(1, ranks - 0.5))
    for name in METRICS:
        if name == "mr":
            assert (values[name] >= 1).all()
            assert (better[name] <= values[name]).all()
        else:
            assert ((values[name] >= 0) & (values[name] <= 1)).all()
            assert (better[name] >= values[name]).all()
    assert (values["hits_at_1"] <= values["hits_at_3"]).all()
    assert (values["hits_at_3"] <= values["hits_at_10"]).all()
    assert (values["hits_at_1"] <= values["mrr"]).all()


def test_groups_are_drawn_whole():
    group = np.tile(np.arange(20), 2)  # as both questions of 20 triples lie
    opposite = np.concatenate([np.arange(20.0), -np.arange(20.0)])
    drawn = resample(opposite[None], group, 150)
    assert drawn.shape == (1, 150)
    # The two of a group cancel; drawn apart they would not.
    np.testing.assert_allclose(drawn, 0, atol=1e-12)
    assert resample(np.arange(40.0)[None], group, 150).std() > 0


def test_a_resample_is_the_mean_over_the_queries_of_the_groups_drawn():
    # Group 7 has one query of value 6, group 3 three of value 2: drawn 2 + 0, 1 + 1 or 0 + 2 times
    # gives 12 / 2, (6 + 6) / 4 or 12 / 6.
    drawn = resample(np.array([[2.0, 6, 2, 2]]), np.array([3, 7, 3, 3]), 400)[0]
    places, counts = np.unique(drawn, return_counts=True)
    assert places.tolist() == [2, 3, 6]
    # Chances 1/4, 1/2, 1/4 of 400; five standard deviations of at most 10.
    assert counts == pytest.approx([100, 200, 100], abs=50)


def test_all_scores_see_the_same_draw_which_follows_from_the_seed():
    values = np.random.default_rng(0).random((1, 30))
    group = np.arange(30) // 2
    drawn = resample(np.concatenate([values, 1 - 2 * values]), group, 130, seed=4)
    # Rounding in double precision.
    np.testing.assert_allclose(drawn[1], 1 - 2 * drawn[0], atol=1e-12)
    np.testing.assert_allclose(drawn[:1], resample(values, group, 130, seed=4), atol=1e-12)
    assert not np.allclose(drawn[:1], resample(values, group, 130, seed=5))
    assert len(np.unique(drawn[0])) > 100  # the second hundred is not the first again


def test_resamples_lie_about_the_value_and_spread_as_arithmetic_says():
    values = np.random.default_rng(1).random((1, 200))
    drawn = resample(values, np.tile(np.arange(100), 2), 4000)[0]
    means = values[0].reshape(2, 100).mean(0)
    error = means.std() / np.sqrt(100)  # of a mean of 100 groups drawn with repetition
    assert drawn.mean() == pytest.approx(values.mean(), abs=5 * error / np.sqrt(4000))
    # The relative error of a standard deviation from 4000 draws is 1 / sqrt(8000): six of them.
    assert drawn.std() == pytest.approx(error, rel=0.07)
