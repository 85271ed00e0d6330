import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr
from torch.nn.functional import normalize

from workbench.conditions import normalise_condition
from workbench.errors import DataError, RunError
from workbench.model import HyperCL
from workbench.pair_changes import (
    LONGEST_OWN,
    MOST_OWN,
    agreement,
    attribute_of,
    bundled_pairs,
    compare,
    cosines_by_condition,
    flipped_share,
    flips,
    known_conditions,
    movers,
    parse_pairs,
    scored_pairs,
    separations,
    shows_texts,
    with_changes,
)
from workbench.runs import Run

values = st.lists(st.integers(-50, 50), min_size=2, max_size=12, unique=True)


class Letters(HyperCL):
    """A text is its letters' counts; a condition keeps those letters alone that it holds."""

    def __init__(self):
        self.embedded = 0

    def encode(self, texts, condition, strength=1.0):
        self.embedded += len(texts)
        counts = torch.tensor(
            [[text.lower().count(letter) + 0.01 for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]
        )
        held = [letter in normalise_condition(condition).lower() for letter in "abcdefghijklmnopqrstuvwxyz"]
        kept = counts * torch.tensor(held, dtype=torch.float)
        return normalize((1 - strength) * normalize(counts, dim=1) + strength * normalize(kept, dim=1), dim=1)


def changed(plain, conditioned, **more):
    return with_changes(pl.DataFrame({"plain": plain, "conditioned": conditioned, **more}))


def test_pairs_are_read_by_tab_or_bar_and_stay_text():
    found = parse_pairs("007\ttrue\n\n a b | <b>c</b> \n")
    assert found.rows() == [("007", "true"), ("a b", "<b>c</b>")]
    assert parse_pairs("a|b\tc").rows() == [("a|b", "c")]  # a tab decides, where there is one


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no pairs yet"),
        ("a|b\nonly one", "line 2 of your pairs holds 1 text;"),
        ("a|b|c", "line 1 of your pairs holds 3 texts"),
        ("a| ", "line 1 of your pairs is empty"),
        ("a|b\n" * (MOST_OWN + 1), f"at most {MOST_OWN}"),
        ("é" * LONGEST_OWN, f"take {2 * LONGEST_OWN:,} bytes"),
    ],
)
def test_pairs_that_cannot_be_used_are_named(text, complaint):
    with pytest.raises(DataError, match=complaint):
        parse_pairs(text)


def test_bundled_pairs_have_the_gold_score_of_their_attribute():
    found = bundled_pairs("food")
    assert found["domain"].unique().to_list() == ["animals"]
    assert found.height == 20 * 19 // 2  # all couples of the split's 20 animals
    same = pl.col("value1") == pl.col("value2")
    assert found.filter(same)["gold"].unique().to_list() == [1.0]
    assert found.filter(~same)["gold"].unique().to_list() == [0.0]
    assert bundled_pairs("").height == 4 * 190
    with pytest.raises(DataError, match="no attribute 'foot'"):
        bundled_pairs("foot")


@pytest.mark.parametrize(
    ("condition", "attribute"),
    [("The hue.", "colour"), ("  the HUE", "colour"), ("its size please", "size"), ("Joy", ""), ("", "")],
)
def test_a_condition_names_its_attribute(condition, attribute):
    assert attribute_of(condition) == attribute


def test_changes_ranks_and_fields_by_hand():
    found = changed([0.1, 0.2, 0.3, 0.4], [0.9, -0.1, 0.3, 0.8])
    assert found["change"].to_list() == pytest.approx([0.8, -0.3, 0.0, 0.4])
    assert found["rank_plain"].to_list() == [4, 3, 2, 1]
    assert found["rank_conditioned"].to_list() == [1, 4, 3, 2]
    assert found["rank_move"].to_list() == [3, -1, -1, -1]
    # Medians 0.25 and 0.55.
    assert found["quadrant"].to_list() == ["brought together", "stays apart", "parted", "stays alike"]


def test_movers_are_the_largest_changes_each_way():
    found = movers(changed([0.0] * 5, [0.5, -0.2, 0.0, 0.1, -0.4]), most=1)
    assert found["row"].to_list() == [4, 0]


def test_flipped_couples_by_hand():
    # Of three couples two turn round: 0 above 1 and 0 above 2 become below; 1 above 2 stays.
    before, after = np.array([3.0, 2.0, 1.0]), np.array([0.0, 2.0, 1.0])
    assert flipped_share(before, after) == pytest.approx(2 / 3)
    found = flips(before, after)
    assert found.select("above", "below").rows() == [(0, 1), (0, 2)]
    # 0 over 1: 1 before, -2 after, so size 1; 0 over 2: 2 before, -1 after, so size 1.
    assert found["size"].to_list() == [1, 1]
    assert flips(before, before).is_empty()
    assert np.isnan(flipped_share(before[:1], after[:1]))


@given(values, st.randoms())
def test_the_share_of_flips_is_kendalls_tau(before, shuffler):
    after = before[:]
    shuffler.shuffle(after)
    share = flipped_share(np.array(before, float), np.array(after, float))
    assert share == pytest.approx((1 - kendalltau(before, after).statistic) / 2)
    assert 0 <= share <= 1


@given(values)
def test_what_keeps_the_order_flips_nothing_and_its_reverse_everything(before):
    array = np.array(before, float)
    assert flipped_share(array, 3 * array + 1) == 0
    assert flipped_share(array, -array) == 1


def test_flips_are_found_across_the_chunks_they_are_compared_in():
    before = np.arange(600.0)
    after = before.copy()
    after[[5, 590]] = after[[590, 5]]
    assert flips(before, after, most=1).row(0) == (590, 5, 585.0, -585.0, 585.0)


def test_agreement_is_spearmans_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    gold, plain, conditioned = rng.random((3, 60))
    found = agreement(changed(plain, conditioned + gold, gold=gold)).to_dicts()
    for row, scores in zip(found, (plain, conditioned + gold), strict=True):
        assert row["value"] == pytest.approx(spearmanr(scores, gold).statistic)
        assert row["low"] <= row["value"] <= row["high"]
        assert row["count"] == 60
    assert agreement(changed([0.1] * 5, [0.2] * 5)) is None
    assert agreement(changed([0.1] * 5, [0.2] * 5, gold=[1.0] * 5)) is None


def test_pairs_are_compared_once_per_sentence():
    model, pairs = Letters(), parse_pairs("aab|abb\naab|ccc")
    found, before, after = compare(model, pairs, "c a")
    assert model.embedded == 6  # three sentences, twice
    assert found.select("first", "second").rows() == [(0, 1), (0, 2)]
    # aab and abb: (2*1 + 1*2) / 5 = 0.8 plain; of a alone they are the same.
    assert found["plain"][0] == pytest.approx(0.8, abs=0.02)
    assert found["conditioned"][0] == pytest.approx(1.0, abs=0.02)
    np.testing.assert_allclose(np.diag(before), 1, atol=1e-6)
    np.testing.assert_allclose(after, after.T, atol=1e-6)
    same = compare(model, pairs, "c a", 0.0)[0]
    np.testing.assert_allclose(same["plain"], same["conditioned"])
    with pytest.raises(DataError, match="empty"):
        compare(model, pairs, "  ")


def test_the_condition_that_parts_a_pair_most_stands_first():
    pairs, said = parse_pairs("aaa|bbb\naaa|aaa\nxyz|zyx"), []
    cosines = cosines_by_condition(Letters(), pairs, said=said.append)
    assert len(said) == cosines.width == known_conditions().height
    found = separations(0.25, cosines, 0)
    assert found["change"].is_sorted()
    np.testing.assert_allclose(found["change"], found["cosine"] - 0.25)
    # Nothing is less alike than the first pair; the second is at least as alike as all others.
    assert found["less_alike"].max() == 0
    assert separations(1.0, cosines, 1)["less_alike"].min() >= 0.0
    assert np.isnan(separations(1.0, cosines[:1], 0)["less_alike"][0])


def test_a_runs_scores_stand_beside_its_pairs(tiny_run):
    found = scored_pairs(tiny_run, "hadamard")
    scores = tiny_run.scores.filter(split="test")
    row = found.row(3, named=True)
    own = scores.filter(row=row["row"], model="hadamard")["score"]
    assert row["conditioned"] == pytest.approx(own.mean(), rel=1e-6)
    assert row["plain"] == pytest.approx(scores.filter(row=row["row"], model="cosine")["score"][0], rel=1e-6)
    assert {"sentence1", "sentence2", "condition"} <= {*found.columns}
    with pytest.raises(RunError, match="no scores of 'nobody'"):
        scored_pairs(tiny_run, "nobody")


def test_texts_from_somebodys_files_are_never_read(tiny_run, monkeypatch):
    run = Run(tiny_run.folder)
    run.__dict__["recipe"] = {**tiny_run.recipe, "data": {**tiny_run.recipe["data"], "source": "files"}}
    monkeypatch.setattr("workbench.pair_changes.load_pairs", lambda _: pytest.fail("texts were read"))
    assert not shows_texts(run)
    found = scored_pairs(run, "hadamard")
    assert {"row", "pair", "gold", "plain", "conditioned"} <= {*found.columns}
    assert not {"sentence1", "sentence2", "condition"} & {*found.columns}
