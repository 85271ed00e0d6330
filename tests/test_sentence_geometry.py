"""The instruments of the neighbouring literature on a model of the workbench, by hand where possible."""

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import spearmanr

from workbench import sentence_geometry as geometry
from workbench.datasets.bundled import sentences
from workbench.encoders import TextEncoder
from workbench.errors import DataError
from workbench.geometry.slices import depth_embeddings
from workbench.model import HyperCL
from workbench.papers.hyper_cl import ConditionedHead
from workbench.papers.hyper_cl_settings import ModelSettings
from workbench.sentence_geometry import (
    Views,
    agreement_measured,
    alignment_table,
    deletion_table,
    held_out,
    overall,
    rank_table,
    shared_attributes,
    slice_table,
    spaces_of,
    static_table,
    whitening_table,
)
from workbench.static_encoder import StaticEncoder


@pytest.fixture(scope="module")
def model(encoder, tmp_path_factory) -> HyperCL:
    """Return a head as it starts: generated projections near the identity."""
    torch.manual_seed(0)
    settings = ModelSettings(name="head", kind="hyper", rank=4, identity=True)
    return HyperCL(ConditionedHead(settings, 384, 384), encoder, tmp_path_factory.mktemp("cache"))


def test_the_sentences_are_those_that_no_model_was_trained_on_and_attributes_those_of_all():
    assert held_out().height == 128
    assert set(held_out()["entity"]).isdisjoint(sentences().filter(split="train")["entity"])
    assert shared_attributes() == ["colour", "size", "setting", "weather"]


def test_alignment_by_hand_counts_pairs_that_agree_and_those_that_differ():
    frame = pl.DataFrame({"colour": ["red", "red", "blue"]})
    plain = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    views = Views(frame, plain, {"colour": torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])})
    first, second = alignment_table(views).to_dicts()
    # Plain: the reds are at a right angle, 2; red and blue are 0 and 2 apart, mean 1.
    assert (first["side"], first["alignment"], first["apart"], first["pairs"]) == ("plain", 2, 1, 1)
    # Under the condition: the reds are one point, blue is opposite, 4 from both.
    assert (second["alignment"], second["apart"]) == (0, 4)
    assert second["uniformity"] == pytest.approx(np.log((1 + 2 * np.exp(-8)) / 3), rel=1e-5)


def test_views_are_the_models_own_embeddings(model):
    frame = held_out().head(3)
    views = Views.of(model, frame, ["colour"])
    texts = frame["sentence"].to_list()
    torch.testing.assert_close(views.plain, model.encode(texts, "any", strength=0.0))
    torch.testing.assert_close(views.conditioned["colour"], model.encode(texts, "The colour."))


def test_overall_agreement_is_the_mean_over_attributes_within_a_domain():
    first, second, agreement = overall()
    assert len(first) == 4 * 32 * 31 // 2
    rows = held_out().to_dicts()
    one, other = rows[first[0]], rows[second[0]]
    assert one["domain"] == other["domain"] == "animals"
    sizes, companies = (
        ["tiny", "small", "medium", "large", "huge"],
        ["alone", "pair", "small group", "large group"],
    )
    expected = [
        1 - abs(sizes.index(one["size"]) - sizes.index(other["size"])) / 4,
        1 - abs(companies.index(one["company"]) - companies.index(other["company"])) / 3,
        *(float(one[name] == other[name]) for name in ("colour", "setting", "weather", "food", "movement")),
    ]
    assert agreement[0] == pytest.approx(np.mean(expected))


def test_the_agreement_score_is_scipys_spearman():
    rows = torch.randn(128, 5, generator=torch.Generator().manual_seed(0))
    first, second, agreement = overall()
    cosine = torch.nn.functional.cosine_similarity(rows[first].double(), rows[second].double())
    assert agreement_measured(rows)["spearman"] == pytest.approx(spearmanr(cosine, agreement).statistic)


def test_whitening_brings_random_pairs_to_zero_and_covariances_to_the_identity(encoder):
    table = whitening_table(encoder, kept=32)
    cells = {(row["layer"], row["treatment"]): row for row in table.to_dicts()}
    assert len(cells) == 9
    for layer in ("first layer", "last layer", "both, averaged"):
        assert abs(cells[layer, "whitened"]["mean_cosine"]) < 0.05
        assert cells[layer, "whitened"]["off_identity"] < 1e-3
        assert cells[layer, "as it is"]["off_identity"] is None
    assert cells["first layer", "as it is"]["mean_cosine"] > 0.5
    whole = agreement_measured(encoder.encode(held_out()["sentence"].to_list()))["spearman"]
    assert cells["last layer", "as it is"]["spearman"] == pytest.approx(whole, abs=1e-3)
    both = depth_embeddings(encoder, held_out()["sentence"].to_list(), (1, 6)).sum(0)
    expected = agreement_measured(both)["spearman"]
    assert cells["both, averaged", "as it is"]["spearman"] == pytest.approx(expected, abs=1e-3)


def test_a_dead_generator_is_told_from_a_living_one_and_the_model_stays_as_it_was(model):
    before = model.head.generator.head.weight.clone()
    living, dead = rank_table(model).to_dicts()
    assert living["generator"] == "trained"
    assert living["effective"] > 3
    assert living["verdict"] == "sound"
    assert dead["effective"] == 0
    assert dead["verdict"].startswith("collapsed")
    assert living["conditions"] == 80
    assert torch.equal(model.head.generator.head.weight, before)


def test_slices_are_of_the_plain_encoder_and_of_the_conditioned_one_by_depth(model, monkeypatch):
    kept = geometry.pairs()["test"].head(60)
    monkeypatch.setattr(geometry, "pairs", lambda: {"test": kept})
    table = slice_table(model)
    assert table.select("embeddings", "depth").unique(maintain_order=True).rows() == [
        ("plain", 3),
        ("plain", 6),
        ("conditioned", 3),
        ("conditioned", 6),
    ]
    assert table["width"].unique().sort().to_list() == [48, 96, 192, 384]
    assert table.filter(embeddings="plain", depth=6, width=384)["share"].item() == 1
    asked = kept.filter(pl.col("condition_kind") != "unseen")
    sides = [
        model.encode_conditioned(asked[side].to_list(), asked["condition"].to_list())
        for side in ("sentence1", "sentence2")
    ]
    expected = spearmanr((sides[0] * sides[1]).sum(1), asked["label"]).statistic
    found = table.filter(embeddings="conditioned", depth=6, width=384)["spearman"].item()
    assert found == pytest.approx(expected, abs=1e-3)  # cosines of single precision tie or not
    # After three layers: the same weights on the vectors that the encoder has there.
    sides = [
        model.encode_conditioned(
            model.prepared_vectors(depth_embeddings(model.encoder, asked[side].to_list(), (3,))[0]),
            asked["condition"].to_list(),
        )
        for side in ("sentence1", "sentence2")
    ]
    expected = spearmanr((sides[0] * sides[1]).sum(1), asked["label"]).statistic
    found = table.filter(embeddings="conditioned", depth=3, width=384)["spearman"].item()
    assert found == pytest.approx(expected, abs=1e-3)


def test_deletion_is_the_mean_fall_over_pairs_that_agree(model, monkeypatch):
    cosines = {0: (0.9, 0.2, 0.8), 1: (0.7, 0.5, 0.3)}
    asked = []

    def deletion(self, first, second, condition):
        asked.append((first, second, condition))
        return cosines[len(asked) - 1]

    monkeypatch.setattr(geometry.WordAttribution, "deletion", deletion)
    table = deletion_table(model, count=2)
    agree = geometry.pairs()["test"].filter((pl.col("label") == 1) & (pl.col("condition_kind") != "unseen"))
    known = set(agree.select("sentence1", "sentence2", "condition").rows())
    assert set(asked) <= known
    assert table["words"].to_list() == ["none", "of the five strongest pairs", "drawn", "difference"]
    assert table["cosine"].to_list()[:3] == pytest.approx([0.8, 0.35, 0.55])
    assert table["fall"].to_list()[1:] == pytest.approx([0.45, 0.25, 0.2])
    assert table.filter(words="difference").select("low", "high").row(0) == pytest.approx((-0.2, 0.6))
    assert table["pairs"].to_list() == [2] * 4


def test_spaces_of_models_are_theirs_under_one_condition_and_the_plain_encoders(model):
    spaces, (train, test) = spaces_of({"one": model}, "size")
    assert list(spaces) == ["plain encoder", "one"]
    assert spaces["one"].train.shape == (192, 384)
    assert len(train) == 192
    assert len(test) == 128
    sizes = ["tiny", "small", "medium", "large", "huge"]
    assert [sizes[number] for number in test] == held_out()["size"].to_list()
    texts = held_out()["sentence"].to_list()
    torch.testing.assert_close(spaces["one"].test, model.encode(texts, "The size."))


def recorded(kind, calls):
    """Encode as before, and note who did, on how many threads and what."""
    whole = kind.encode

    def encode(self, texts, *given):
        calls.append((kind.__name__, torch.get_num_threads(), tuple(texts)))
        return whole(self, texts, *given)

    return encode


def test_a_word_table_is_held_against_its_teacher_and_against_input_vectors(encoder, monkeypatch):
    def untrained(teacher: TextEncoder, texts: list[str], kept: int) -> StaticEncoder:
        assert len(texts) == 192
        vectors = teacher.model[0].auto_model.get_input_embeddings().weight.detach()
        return StaticEncoder(teacher.model.tokenizer.backend_tokenizer, vectors[:, :kept].contiguous())

    monkeypatch.setattr(StaticEncoder, "distil", untrained)
    timed = []
    for kind in (TextEncoder, StaticEncoder):
        monkeypatch.setattr(kind, "encode", recorded(kind, timed))
    teacher, table, plain = static_table(encoder, kept=384, rounds=2).to_dicts()
    # All once to warm up; then in turn, on one thread and on the same texts.
    assert [name for name, *_ in timed[3:]] == ["TextEncoder", *["StaticEncoder"] * 40] * 2
    assert {threads for _, threads, _ in timed[3:]} == {1}
    assert {texts for *_, texts in timed} == {tuple(held_out()["sentence"])}
    # Not exactly one: polars divides a column by a number as a product with the number's inverse.
    assert (teacher["share"], teacher["speed"]) == pytest.approx((1, 1))
    assert table["spearman"] == plain["spearman"]  # the same vectors
    assert table["share"] == pytest.approx(table["spearman"] / teacher["spearman"])
    assert table["speed"] == pytest.approx(table["texts_per_second"] / teacher["texts_per_second"])
    monkeypatch.setattr(TextEncoder, "pooling", "cls")
    with pytest.raises(DataError, match="pools by cls"):
        static_table(encoder)


def test_agreement_has_an_interval_over_sentences(encoder):
    rows = encoder.encode(held_out()["sentence"].to_list())
    found, again = agreement_measured(rows), agreement_measured(rows)
    assert found == again
    assert found["spearman"] == pytest.approx(geometry.agreement_measured(rows, 2)["spearman"])
    assert found["low"] < found["spearman"] < found["high"]
    assert found["sentences"] == held_out().height
    # Weights by hand: the first resample's pairs, each as often as its two sentences were drawn.
    first, second, agreement = overall()
    drawn = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), 1)[0]
    times = drawn[first.numpy()] * drawn[second.numpy()]
    cosine = (rows[first] * rows[second]).sum(1).numpy()
    expected = spearmanr(np.repeat(cosine, times), np.repeat(agreement, times)).statistic
    assert agreement_measured(rows, 1)["low"] == pytest.approx(expected, abs=1e-4)
