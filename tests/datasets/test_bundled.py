"""The bundled set: what its sentences, labels and splits promise."""

from itertools import combinations

import polars as pl
import pytest

from workbench.datasets import bundled


@pytest.fixture(scope="module")
def sentences():
    return bundled.sentences()


@pytest.fixture(scope="module")
def pairs():
    return bundled.pairs()


def attributes_of(table: pl.DataFrame, domain: str) -> list[str]:
    part = table.filter(domain=domain)
    return [name for name in bundled.attributes() if part[name].null_count() == 0]


def test_there_are_enough_sentences_domains_and_attributes(sentences):
    assert sentences.height >= 240
    assert sentences["domain"].n_unique() >= 4
    assert all(len(attributes_of(sentences, domain)) >= 6 for domain in bundled.DOMAINS)


def test_no_sentence_and_no_entity_stands_twice(sentences):
    assert sentences["sentence"].is_unique().all()
    assert sentences.select("domain", "entity").is_unique().all()
    assert sentences["id"].is_unique().all()


def test_sentences_are_sentences(sentences):
    lengths = sentences["sentence"].str.split(" ").list.len()
    assert lengths.min() >= 8
    assert lengths.max() <= 60
    assert sentences["sentence"].str.contains(r"[.!?]$").all()


def test_every_value_is_one_the_attribute_declares(sentences):
    for name, about in bundled.attributes().items():
        found = set(sentences[name].drop_nulls())
        assert found == set(about["values"]), name


def test_an_attribute_belongs_to_a_whole_domain_or_not_at_all(sentences):
    for name in bundled.attributes():
        filled = sentences.group_by("domain").agg(pl.col(name).is_not_null().mean())[name]
        assert set(filled) <= {0.0, 1.0}, name


def test_every_attribute_has_several_phrasings_and_no_two_attributes_share_one():
    phrasings = [text for about in bundled.attributes().values() for text in about["phrasings"]]
    assert len(set(phrasings)) == len(phrasings)
    assert min(len(about["phrasings"]) for about in bundled.attributes().values()) >= 3


@pytest.mark.parametrize(
    ("attribute", "first", "second", "expected"),
    [
        ("colour", "red", "red", 1.0),
        ("colour", "red", "green", 0.0),  # nominal: no two different values are closer than others
        ("colour", "red", "grey", 0.0),
        ("size", "tiny", "tiny", 1.0),
        ("size", "tiny", "huge", 0.0),  # ends of five: 1 - 4 / 4
        ("size", "tiny", "small", 0.75),  # neighbours of five: 1 - 1 / 4
        ("size", "large", "small", 0.5),  # two apart, the other way round: 1 - 2 / 4
        ("company", "alone", "pair", 2 / 3),  # neighbours of four: 1 - 1 / 3
        ("price", "cheap", "moderate", 0.5),  # neighbours of three: 1 - 1 / 2
    ],
)
def test_a_label_follows_from_the_two_values(attribute, first, second, expected):
    assert bundled.label(attribute, first, second) == pytest.approx(expected)
    assert bundled.label(attribute, second, first) == pytest.approx(expected)


def test_every_row_is_labelled_by_the_rule(sentences, pairs):
    values = {row["sentence"]: row for row in sentences.to_dicts()}
    for table in pairs.values():
        for row in table.to_dicts():
            one, other = (values[row[side]][row["attribute"]] for side in ("sentence1", "sentence2"))
            assert row["label"] == bundled.label(row["attribute"], one, other)
            assert row["condition"] in bundled.attributes()[row["attribute"]]["phrasings"]


def test_splits_share_no_entity(sentences, pairs):
    entity = dict(sentences.select("sentence", "id").iter_rows())
    used = {
        split: {entity[text] for side in ("sentence1", "sentence2") for text in table[side]}
        for split, table in pairs.items()
    }
    for one, other in combinations(used, 2):
        assert not used[one] & used[other]
    assert sum(len(ids) for ids in used.values()) == sentences.height  # and none is left out


def test_a_pair_compares_two_different_sentences_of_one_domain(sentences, pairs):
    domain = dict(sentences.select("sentence", "domain").iter_rows())
    for table in pairs.values():
        assert (table["sentence1"] != table["sentence2"]).all()
        assert [domain[text] for text in table["sentence1"]] == table["domain"].to_list()
        assert [domain[text] for text in table["sentence2"]] == table["domain"].to_list()


def test_held_out_phrasings_and_attributes_are_never_trained_or_chosen_on(pairs):
    about = bundled.attributes()
    held_out = {item["phrasings"][-1] for item in about.values()}
    untrained = {name for name, item in about.items() if not item.get("trained", True)}
    for split in ("train", "valid"):
        assert not held_out & set(pairs[split]["condition"])
        assert not untrained & set(pairs[split]["attribute"])
        assert set(pairs[split]["condition_kind"]) == {"seen"}


def test_the_test_split_says_truly_how_new_each_condition_is(pairs):
    trained = set(pairs["train"]["condition"])
    asked = set(pairs["train"]["attribute"])
    test = pairs["test"]
    for kind, phrasing_known, attribute_known in (
        ("seen", True, True),
        ("rephrased", False, True),
        ("unseen", False, False),
    ):
        part = test.filter(condition_kind=kind)
        assert part.height >= 100
        assert part["condition"].is_in(list(trained)).eq(phrasing_known).all()
        assert part["attribute"].is_in(list(asked)).eq(attribute_known).all()


def test_each_pair_has_one_high_and_one_low_row_far_enough_apart(pairs):
    for table in pairs.values():
        known = pl.col("condition_kind") != "unseen"
        rows = table.group_by("sentence1", "sentence2", known).agg(
            pl.len(), gap=pl.col("label").max() - pl.col("label").min()
        )
        assert set(rows["len"]) == {2}
        assert rows["gap"].min() >= 0.5


def test_each_attribute_is_high_as_often_as_low_in_every_domain_and_split(pairs):
    for table in pairs.values():
        known = pl.col("condition_kind") != "unseen"
        middle = (pl.col("label").max() + pl.col("label").min()).over("sentence1", "sentence2", known) / 2
        side = pl.when(pl.col("label") > middle).then(1).otherwise(-1)
        surplus = table.with_columns(side=side).group_by("domain", "attribute").agg(pl.col("side").sum())
        # A pair is taken only if it moves its two attributes towards balance, which keeps all within 3 of it.
        assert surplus["side"].abs().max() <= 3


def test_the_pairs_are_the_same_at_every_call(pairs):
    again = bundled.pairs()
    assert list(again) == ["train", "valid", "test"]
    assert all(again[split].equals(pairs[split]) for split in pairs)


def test_a_score_that_sees_only_the_condition_orders_pairs_no_better_than_chance(pairs):
    train, test = pairs["train"], pairs["test"].filter(pl.col("condition_kind") == "seen")
    means = train.group_by("condition").agg(score=pl.col("label").mean())
    rows = test.join(means, on="condition").sort("label")
    low, high = (
        rows.group_by("sentence1", "sentence2", maintain_order=True).agg(pl.col("score").get(place))["score"]
        for place in (0, 1)
    )
    share = ((high > low).cast(pl.Float64) + 0.5 * (high == low).cast(pl.Float64)).mean()
    # About 300 pairs: the standard error at 0.5 is 0.03, so 0.1 is more than three of them.
    assert abs(share - 0.5) < 0.1
