"""SimCSE and DiffCSE: what is replaced, what the gradient reaches, ablations."""

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch.nn import functional

from tests.families.histories import outcome_of_each
from workbench.errors import RecipeError
from workbench.families import sentences
from workbench.families.sentences import (
    STD,
    Encoder,
    Replacer,
    SentenceModel,
    cut,
    found_words,
    load_data,
    measure,
    scores,
    tokenised,
)
from workbench.papers import load_recipe
from workbench.static_encoder import StaticEncoder
from workbench.training import seed_everything

CHANGES = {
    "training": {"epochs": 1, "batch_size": 12, "learning_rate": 5e-3},
    "sentences": 240,
}
WHO = ["a man", "a woman", "the old dog", "my small cat", "some children", "the tired teacher"]
WHAT = ["plays a flute", "reads a long book", "runs along the beach", "eats an apple", "paints the wall"]
WHERE = ["in the park", "at home", "near the lake", "on monday", "while it rains", "for fun", "again", "now"]


@pytest.fixture(scope="module")
def content(encoder):
    every = [f"{who} {what} {where}." for who in WHO for what in WHAT for where in WHERE]
    train = pl.DataFrame({"sentence1": every[::2], "sentence2": every[1::2]})
    first, second = every[:60], [*every[1:31], *every[200:230]]
    gold = [4.5] * 30 + [0.5] * 30
    return tokenised(encoder, train, pl.DataFrame({"sentence1": first, "sentence2": second, "score": gold}))


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("family_sentences", CHANGES)


def model_of(**settings) -> SentenceModel:
    return SentenceModel(**{"name": "own", "kind": "simcse", **settings})


def built(content, **settings) -> Encoder:
    seed_everything(0)
    return Encoder(content, model_of(**settings)).eval()


def test_the_word_table_holds_principal_components_of_the_encoders(encoder, monkeypatch):
    monkeypatch.setattr(sentences, "WIDTH", 8)
    texts = [f"{who} {what}." for who in WHO for what in WHAT]
    pairs = pl.DataFrame({"sentence1": texts[::2], "sentence2": texts[1::2], "score": [1.0] * 15})
    words = tokenised(encoder, pairs, pairs).words
    ids = sorted({one for text in texts for one in encoder.model.tokenizer(text)["input_ids"]})
    own = encoder.model[0].auto_model.get_input_embeddings().weight.detach()[ids].numpy()
    expected = PCA(8).fit(own).explained_variance_
    assert words.shape == (len(ids) + 1, 8)
    assert not words[0].any()
    assert words[1:].double().var(0).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_only_words_are_replaced_and_by_what_followed_the_same_word(content):
    ids, mask = cut(content.first, torch.arange(60))
    edited = Replacer(content)(ids, mask, 0.99, torch.Generator().manual_seed(0))
    changed = edited != ids
    assert changed.any()
    assert not (changed & ~mask).any()
    assert not (changed & torch.isin(ids, content.special)).any()
    assert not torch.isin(edited[changed], content.special).any()
    follows = set(zip(content.train.ids[:-1].tolist(), content.train.ids[1:].tolist(), strict=True))
    for row, column in changed.nonzero().tolist():
        assert (int(ids[row, column - 1]), int(edited[row, column])) in follows


def test_the_share_of_replaced_words_is_bounded_by_what_was_asked(content):
    ids, mask = cut(content.first, torch.arange(60))
    replace = Replacer(content)
    few, many = (
        float((replace(ids, mask, share, torch.Generator().manual_seed(0)) != ids)[mask].double().mean())
        for share in (0.1, 0.8)
    )
    # A draw may hit the word itself, and marks are never drawn.
    assert 0 < few < 0.1
    assert few < many < 0.8


def test_an_embedding_is_the_mean_of_token_states_and_does_not_see_padding(content):
    net = built(content)
    lengths = content.first.offsets.diff()
    rows = torch.stack([lengths.argmin(), lengths.argmax()])
    assert lengths[rows[0]] < lengths[rows[1]]
    both = net(*cut(content.first, rows))
    for row in (0, 1):
        alone = cut(content.first, rows[row : row + 1])
        states = net.body(input_ids=alone[0], attention_mask=alone[1].long()).last_hidden_state
        torch.testing.assert_close(both[row], states[0].mean(0), atol=1e-5, rtol=1e-4)


def test_without_dropout_both_readings_of_a_sentence_are_equal_and_with_it_they_are_not(content):
    ids, mask = cut(content.first, torch.arange(4))
    for dropout, equal in ((0.0, True), (0.1, False)):
        net = built(content, dropout=dropout).train()
        one, two = net(ids.repeat(2, 1), mask.repeat(2, 1)).chunk(2)
        assert torch.allclose(one, two, atol=1e-6) == equal


def test_detection_follows_its_equation_and_only_the_informed_one_moves_the_encoder(content):
    ids, mask = cut(content.first, torch.arange(5))
    for settings, informed in (({"kind": "diffcse"}, True), ({"blind": True}, False)):
        net = built(content, dropout=0.0, **settings)
        sentences = net(ids, mask)
        odds = net.detect(ids.flip(0), mask, sentences)
        states = net.detector(input_ids=ids.flip(0), attention_mask=mask.long()).last_hidden_state
        expected = states @ net.verdict.weight[0] + net.verdict.bias
        if informed:
            expected = expected + torch.einsum(
                "bld,de,be->bl", states, net.match.weight, functional.normalize(sentences, dim=-1)
            )
        torch.testing.assert_close(odds, expected, atol=1e-5, rtol=1e-4)
        odds.sum().backward()
        reached = [one.grad for one in net.body.parameters() if one.grad is not None and one.grad.any()]
        assert bool(reached) == informed


def test_scores_agree_with_independent_implementations():
    draw = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 30, 8, generator=draw)
    gold = torch.rand(30, generator=draw) * 5
    found = scores(one, two, gold)
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(one, two, strict=True)]
    assert found["spearman"] == pytest.approx(stats.spearmanr(cosines, gold.numpy()).statistic, abs=1e-9)
    alike = [2 - 2 * cosine for cosine, score in zip(cosines, gold, strict=True) if score > 4]
    assert found["alignment"] == pytest.approx(np.mean(alike), rel=1e-5)
    unit = functional.normalize(torch.cat([one, two]), dim=-1)
    expected = torch.pdist(unit).square().mul(-2).exp().mean().log()
    assert found["uniformity"] == pytest.approx(float(expected), rel=1e-5)


def test_found_words_agree_with_scikit_learn(content):
    net = built(content, kind="diffcse")
    found = found_words(net, content, 0.3, 5)
    ids, mask = cut(content.first, torch.arange(60))
    edited = Replacer(content)(ids, mask, 0.3, torch.Generator().manual_seed(5))
    with torch.no_grad():
        odds = net.detect(edited, mask, net(ids, mask))[mask]
    truth = (edited != ids)[mask]
    assert found["detection_auc"] == pytest.approx(roc_auc_score(truth, odds), abs=1e-6)
    assert found["detection_accuracy"] == pytest.approx(balanced_accuracy_score(truth, odds > 0), abs=1e-9)


@pytest.fixture(scope="module")
def outcomes(recipe, content, tmp_path_factory):
    return outcome_of_each(measure, recipe, content, tmp_path_factory.mktemp)


def test_the_loss_of_the_first_step_is_the_contrast_of_two_readings(content, tmp_path):
    # Without dropout both readings are those of an untrained encoder; all sentences in one batch.
    count = len(content.train)
    training = {"epochs": 1, "batch_size": count, "learning_rate": 1e-9}
    recipe = load_recipe("family_sentences", {"training": training, "sentences": count})
    seed_everything(0)
    history = measure(recipe, content, model_of(dropout=0.0), 0, tmp_path).about["history"]
    read = sentences.embed(built(content, dropout=0.0), content.train, torch.arange(count))
    unit = functional.normalize(read.double(), dim=-1)
    expected = (torch.logsumexp(unit @ unit.T / recipe.temperature, 1) - 1 / recipe.temperature).mean()
    assert history[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_twenty_steps_spread_the_sentences_and_lower_the_loss(outcomes):
    for name in ("simcse", "simcse_no_dropout", "diffcse"):
        assert outcomes[name].values["uniformity"] < outcomes["untrained"].values["uniformity"] - 0.3
    history = outcomes["simcse"].about["history"]
    assert history[-1]["loss"] < history[0]["loss"] - 0.5


def test_a_detector_beside_simcse_leaves_the_encoder_as_it_is(recipe, content, tmp_path):
    found = []
    for blind in (True, False):
        seed_everything(0)
        # Without dropout, so that both draw the same numbers.
        model = model_of(blind=blind, dropout=0.0)
        (tmp_path / str(blind)).mkdir()
        found.append(measure(recipe, content, model, 0, tmp_path / str(blind)).values)
    assert found[0]["uniformity"] == pytest.approx(found[1]["uniformity"], rel=1e-3)
    assert "detection_auc" in found[0]
    assert "detection_auc" not in found[1]


def test_the_same_seed_gives_the_same_numbers(recipe, content, outcomes, tmp_path):
    seed_everything(0)
    model = next(model for model in recipe.models if model.name == "diffcse")
    assert measure(recipe, content, model, 0, tmp_path).values == outcomes["diffcse"].values


def test_whitening_needs_no_training_and_leaves_no_direction_in_charge(outcomes):
    assert "history" not in outcomes["whitened"].about
    assert outcomes["whitened"].values["uniformity"] < outcomes["untrained"].values["uniformity"]


def test_the_word_table_is_distilled_from_the_drawn_sentences_of_the_packaged_encoder(
    outcomes, recipe, content
):
    found = outcomes["word_table"]
    assert found.about == {"parameters": 0}
    chosen = [content.texts[row] for row in sentences.drawn(recipe, content, 0).tolist()]
    table = StaticEncoder.distil(content.encoder, chosen, kept=len(chosen) - 2)
    expected = sentences.scores(*(table.encode(side) for side in content.sides), content.score)
    assert found.values == pytest.approx(expected)
    assert found.values != outcomes["packaged"].values


def test_whitening_the_packaged_encoder_is_a_closed_form_beside_it(outcomes):
    packaged, whitened = (outcomes[name] for name in ("packaged", "packaged_whitened"))
    assert whitened.about == packaged.about == {"parameters": 0}
    assert whitened.values["uniformity"] < packaged.values["uniformity"]


def test_the_random_table_has_the_start_of_the_layers_and_the_other_that_of_the_words(content):
    table = built(content).body.get_input_embeddings().weight.detach()[1:]
    assert float(table.std()) == pytest.approx(STD, rel=1e-4)
    cosine = functional.cosine_similarity(table.flatten(), content.words[1:].flatten(), dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-5)
    random = built(content, words="random").body.get_input_embeddings().weight.detach()[1:]
    assert abs(float(functional.cosine_similarity(random.flatten(), table.flatten(), dim=0))) < 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [({"kind": "bert"}, "models.0.kind"), ({"kind": "simcse", "dropout": 1.0}, "models.0.dropout"),
     ({"kind": "untrained", "blind": True}, "blind belongs to kind simcse, not untrained")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(change, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(
            "family_sentences", {**CHANGES, "models": [{"name": "wrong", **change}], "reference": "wrong"}
        )


def test_the_prepared_set_is_read(prepared):
    prepared("stsb-en")
    loaded = load_data(load_recipe("family_sentences"))
    assert loaded.counts == {"train": {"sentences": 10536}, "test": {"pairs": 1379}}
