"""Hyper-CL with the encoder in training, on tiny transformers with random weights and real sentences."""

import math
import re
import string
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertModel, BertTokenizer, RobertaConfig, RobertaModel, RobertaTokenizer

from workbench import finetuning
from workbench.datasets.pairs import PairData, load_pairs, unique_texts
from workbench.encoders import TextEncoder
from workbench.finetuning import Finetuning, Reader, TokenIds
from workbench.model import HyperCL
from workbench.papers import hyper_cl, hyper_cl_comparison, load_recipe
from workbench.papers.hyper_cl import ConditionedHead, PairLoss, head_scores
from workbench.papers.hyper_cl_finetuning import JointReader, finetuned
from workbench.papers.hyper_cl_settings import HyperCLRecipe, ModelSettings
from workbench.store import EmbeddingStore
from workbench.training import Training, fit, seed_everything

WIDTH, WINDOW = 32, 96
# Other batches, and another attention kernel, move the last bits of single precision.
BATCHING = {"rtol": 0, "atol": 2e-5}
HALF = {"rtol": 0, "atol": 3e-3}  # token states are kept in half precision; entries reach about 4
OWN = Finetuning(learning_rate=1e-3)

KINDS = {
    "hadamard": {"kind": "hadamard"},
    "concat": {"kind": "concat"},
    "low_rank": {"kind": "hyper", "rank": 4},
    "full": {"kind": "hyper", "start": "paper", "bottleneck": 4, "dropout_sides": "apart"},
    "pooled": {"kind": "hyper", "rank": 4, "identity": True, "pooling": "condition"},
    "one_hot": {"kind": "hyper", "rank": 4, "condition": "one_hot"},
    "bi": {"kind": "bi_encoder"},
    "cross": {"kind": "cross_encoder"},
}
TRI = [name for name in KINDS if name not in ("bi", "cross")]


DATA = {"source": "bundled", "name": "bundled", "limit": 20}


@pytest.fixture(scope="module")
def tables():
    return load_pairs(PairData(**DATA))


@pytest.fixture(scope="module")
def texts(tables):
    return unique_texts(tables.values(), "sentence1", "sentence2", "condition")


@pytest.fixture(scope="module")
def tiny(texts, tmp_path_factory):
    """Make a tiny encoder, saved and opened as a person's own would be; each kind once."""
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 64, "max_position_embeddings": WINDOW + 2}

    @cache
    def parts(family: str) -> Path:
        folder, bert = tmp_path_factory.mktemp(family), family == "bert"
        if bert:  # written, because training one is not repeatable
            words = sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(texts).lower())))
            letters = [f"##{letter}" for letter in string.ascii_lowercase]
            tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters]
            tokens += sorted(set(string.ascii_lowercase) - set(tokens))
            files = {"vocab": {token: number for number, token in enumerate(tokens)}}
        else:
            learner = ByteLevelBPETokenizer()
            special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
            learner.train_from_iterator(texts, vocab_size=1500, show_progress=False, special_tokens=special)
            files = dict(zip(["vocab", "merges"], learner.save_model(str(folder)), strict=True))
        tokenizer = (BertTokenizer if bert else RobertaTokenizer)(**files, model_max_length=WINDOW)
        seed_everything(7)
        config = (BertConfig if bert else RobertaConfig)(vocab_size=len(tokenizer), **shape)
        for part in ((BertModel if bert else RobertaModel)(config), tokenizer):
            part.save_pretrained(folder)
        return folder

    @cache
    def make(family: str = "bert", pooling: str = "mean") -> TextEncoder:
        folder = parts(family)
        modules = [Transformer(str(folder)), Pooling(WIDTH, pooling)]
        SentenceTransformer(modules=modules).save_pretrained(str(folder / pooling))
        return TextEncoder(str(folder / pooling))

    return make


@pytest.fixture(scope="module")
def encoded(tables, tiny, tmp_path_factory):
    return hyper_cl.encode_splits(tables, EmbeddingStore(tiny(), tmp_path_factory.mktemp("store")), "cpu")


def built(name: str, encoder: TextEncoder, encoded, settings: Finetuning = OWN, **changes) -> nn.ModuleDict:
    """Head and encoder in training, as a recipe's job joins them; seeded."""
    model = ModelSettings(name=name, **{**KINDS[name], **changes})
    seed_everything(0)
    head = ConditionedHead(model, WIDTH, encoded.condition_features(model).shape[1])
    return nn.ModuleDict({"head": head, "encoder": finetuned(encoder, settings, encoded, model.kind)})


def train(module: nn.ModuleDict, folder: Path, steps: int, rate: float = 3e-3, every: float = 30.0) -> list:
    loss = PairLoss(module["head"], module["encoder"])
    training = Training(epochs=steps, batch_size=loss.count, learning_rate=3e-3)
    rates = {"encoder.reader.": rate}
    return fit(module, loss, loss.count, training, folder, seed=0, rates=rates, checkpoint_seconds=every)


def copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def read_by(reader: Reader) -> list[list[int]]:
    """Return a list that grows by the token ids of every text the reader's transformer is given."""
    seen = []

    def watch(module, inputs, named, *_):
        both = zip(named["input_ids"], named["attention_mask"].bool(), strict=True)
        seen.extend(ids[mask].tolist() for ids, mask in both)

    reader.transformer.register_forward_hook(watch, with_kwargs=True)
    return seen


def ids_of(encoder: TextEncoder, *text: str) -> list[int]:
    return encoder.model.tokenizer(*text)["input_ids"]


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_reader_gives_the_vectors_of_sentence_transformers(family, pooling, normalise, tiny, texts):
    encoder, some = tiny(family), [*texts[:70], " ".join(texts[:9])]  # the last one is cut to the window
    assert len(ids_of(encoder, some[70])) > WINDOW
    settings = Finetuning(learning_rate=1.0, normalise=normalise, pooling=pooling)
    reader, table = Reader(encoder, settings).eval(), TokenIds.of(encoder, some, "cpu")
    wanted = torch.randperm(71, generator=torch.Generator().manual_seed(0))  # read in several blocks
    plain = tiny(family, pooling).model.encode(some, convert_to_tensor=True)
    expected = functional.normalize(plain, dim=-1) * math.sqrt(WIDTH) if normalise else plain
    _, states = encoder.encode_with_tokens(some)
    with torch.inference_mode():
        found, tokens, mask = reader(table, wanted, tokens=True)
        alone = reader(table, torch.tensor([70]))[0]
    torch.testing.assert_close(found, expected[wanted], **BATCHING)
    torch.testing.assert_close(alone, expected[70:], **BATCHING)
    assert not tokens[~mask].any()
    for row, own, of_row in zip(wanted, mask, tokens, strict=True):
        torch.testing.assert_close(of_row[own], states[row].float(), **HALF)


def test_reading_a_whole_table_equals_reading_its_rows(tiny, texts, monkeypatch):
    monkeypatch.setattr(finetuning, "READ_AT_ONCE", 25)  # 146 texts in six passes
    reader, table = Reader(tiny(), OWN).eval(), TokenIds.of(tiny(), texts, "cpu")
    sentences, tokens = reader.read_all(table, tokens=True)
    with torch.inference_mode():
        expected, states, mask = reader(table, torch.arange(len(texts)), tokens=True)
        found, own = tokens.padded(torch.arange(len(texts)))
    torch.testing.assert_close(sentences, expected, **BATCHING)
    assert torch.equal(own, mask)
    torch.testing.assert_close(found, states, **HALF)
    assert reader.read_all(table, tokens=False)[1] is None


@pytest.mark.parametrize("sides", ["shared", "apart"])
def test_a_tri_encoder_reads_every_distinct_sentence_and_condition_once(sides, tiny, encoded):
    module = built("low_rank", tiny(), encoded, dropout_sides=sides).train()
    seen = read_by(module["encoder"].reader)
    split, rows = encoded.splits["train"], torch.tensor([0, 1, 2, 3, 5, 0])
    module["encoder"].compare(module["head"], split, rows)
    sentences = {encoded.texts[0][side] for part in (split.first, split.second) for side in part[rows]}
    conditions = {encoded.texts[1][number] for number in split.condition[rows]}
    assert len(conditions) < 6
    assert sorted(seen) == sorted(ids_of(tiny(), text) for text in (*sentences, *conditions))


# --- what a bi- and a cross-encoder read --------------------------------------------------------------------


def test_a_bi_encoder_reads_each_sentence_with_its_condition_once(tiny, encoded):
    module = built("bi", tiny(), encoded)
    seen = read_by(module["encoder"].reader)
    split, rows = encoded.splits["test"], torch.tensor([4, 5, 6, 4])
    module["encoder"].compare(module["head"], split, rows)
    sides = {(side[row], split.condition[row]) for side in (split.first, split.second) for row in rows}
    pairs = {(encoded.texts[0][sentence], encoded.texts[1][condition]) for sentence, condition in sides}
    assert sorted(seen) == sorted(ids_of(tiny(), *pair) for pair in pairs)


@pytest.mark.parametrize(
    ("family", "expected"),
    [("bert", "[CLS]{}[SEP]{}[SEP]{}[SEP]"), ("roberta", "<s>{}</s>{}</s></s>{}</s>")],
)
def test_a_cross_encoder_reads_both_sentences_then_the_condition(family, expected, tiny, encoded):
    reader, split = JointReader(tiny(family), OWN, encoded, "cross_encoder"), encoded.splits["valid"]
    keys = reader._key(split.first, split.second, split.condition)
    ids, types, mask = reader.texts.padded(torch.searchsorted(reader.known, keys))
    short = mask.sum(1).argsort()[:5].tolist()  # none of them is cut
    for row in short:
        first, second = (encoded.texts[0][side[row]] for side in (split.first, split.second))
        condition = encoded.texts[1][split.condition[row]]
        shown = tiny(family).model.tokenizer.decode(ids[row][mask[row]]).replace(" ", "")
        assert shown.lower() == expected.format(first, second, condition).replace(" ", "").lower()
        # BERT marks its second segment: the condition and the separator after it.
        marked = len(ids_of(tiny(), condition)) - 1 if family == "bert" else 0
        assert types[row][mask[row]].tolist() == [0] * (int(mask[row].sum()) - marked) + [1] * marked


def test_a_long_pair_is_cut_in_its_sentences_and_never_in_its_condition(tiny, encoded, monkeypatch):
    monkeypatch.setattr(tiny().model, "max_seq_length", 40)
    reader = JointReader(tiny(), OWN, encoded, "cross_encoder")
    assert reader.texts.offsets.diff().max() == 40
    for key, own in zip(reader.known, reader.texts.ids.tensor_split(reader.texts.offsets[1:-1]), strict=True):
        condition = ids_of(tiny(), encoded.texts[1][key % len(encoded.texts[1])])[1:]
        assert own.tolist()[-len(condition) :] == condition


@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_joint_scores_follow_from_reading_row_by_row(kind, tiny, encoded):
    encoder, module = tiny().model[0].auto_model, built(kind, tiny(), encoded).eval()
    split, source, tokenise = encoded.splits["test"], module["encoder"], tiny().model.tokenizer
    found = head_scores(module["head"], source, split)

    def vector(*text: str) -> torch.Tensor:
        read = encoder(**tokenise(*text, truncation=True, return_tensors="pt"))
        return functional.normalize(read.last_hidden_state.mean(1), dim=-1)[0] * math.sqrt(WIDTH)

    for row in (0, 1, 39):
        first, second = (encoded.texts[0][side[row]] for side in (split.first, split.second))
        condition = encoded.texts[1][split.condition[row]]
        with torch.inference_mode():
            if kind == "bi":
                sides = vector(first, condition), vector(second, condition)
                expected = functional.cosine_similarity(*sides, dim=0)
            else:
                linear = source.score[1]
                expected = vector(f"{first} [SEP] {second}", condition) @ linear.weight[0] + linear.bias[0]
        assert found[row].item() == pytest.approx(expected.item(), abs=2e-5)  # other batches


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_falls_in_20_steps_and_the_encoder_copied_from_stays(name, tiny, encoded, tmp_path):
    before = copied(tiny().model)
    module = built(name, tiny(), encoded).eval()
    start, everything = copied(module["encoder"].reader.transformer), torch.arange(20)
    loss = PairLoss(module["head"], module["encoder"])
    with torch.no_grad():
        first = loss(everything).item()
    history = train(module, tmp_path, 20)
    with torch.no_grad():
        last = loss(everything).item()
    assert len(history) == 20
    assert last < 0.97 * first
    assert same(copied(tiny().model), before)
    assert not any(parameter.requires_grad for parameter in tiny().model.parameters())
    assert not same(copied(module["encoder"].reader.transformer), start)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_reaches_the_whole_transformer_and_the_generator(name, family, tiny, encoded):
    module = built(name, tiny(family), encoded).train()
    PairLoss(module["head"], module["encoder"])(torch.arange(20)).backward()
    wanted = {n: p for n, p in module.named_parameters() if p.requires_grad}
    left = {n for n, _ in module.named_parameters()} - wanted.keys()
    assert all(".pooler." in n for n in left)
    assert sum(".transformer." in n for n in wanted) > 30
    for parameter, tensor in wanted.items():
        assert tensor.grad is not None, parameter
        assert torch.isfinite(tensor.grad).all(), parameter
        if ".key.bias" not in parameter:  # softmax takes no notice of it: its gradient is rounding
            assert tensor.grad.abs().max() > 0, parameter


@pytest.mark.parametrize("name", TRI)
def test_scores_from_tables_equal_scores_from_reading_alive(name, tiny, encoded, tmp_path):
    module = built(name, tiny(), encoded)
    train(module, tmp_path, 2)
    head, source = module["head"], module["encoder"]
    tables = source.encoded(tokens=head.settings.pooling != "sentence")
    for split in ("train", "test"):
        alive = head_scores(head, source, source.splits[split])
        # Pooled tokens are kept in half precision.
        atol = 2e-3 if head.settings.pooling == "condition" else 2e-5
        found = head_scores(head, tables, tables.splits[split])
        torch.testing.assert_close(found, alive, rtol=0, atol=atol)
    before = source.encoded(False).sentences - encoded.sentences
    assert before.abs().max() > 1e-3  # the tables are those of the trained encoder


@pytest.mark.parametrize("name", ["low_rank", "cross"])
def test_the_encoder_has_a_learning_rate_of_its_own(name, tiny, encoded, tmp_path):
    module = built(name, tiny(), encoded)
    before = copied(module)
    train(module, tmp_path, 3, rate=1e-12)
    after = copied(module)
    moves = {key: (after[key] - before[key]).abs().max().item() for key in before}
    reader = {key for key in moves if key.startswith("encoder.reader.")}
    # AdamW moves a weight by about its rate: three steps of 1e-12 at most, and rounding of weights near 1.
    assert max(moves[key] for key in reader) < 2e-7
    assert len(moves) > len(reader)
    assert all(moves[key] > 1e-3 for key in moves.keys() - reader)  # the head, and a cross-encoder's score


def test_rates_follow_the_schedule_and_the_first_matching_name(tmp_path):
    module = nn.ModuleDict({name: nn.ParameterList([torch.ones(1)]) for name in ("encoder", "head")})
    training = Training(epochs=1, batch_size=1, learning_rate=0.01, warmup=0.0)
    rates = {"encoder.": 0.1, "encoder": 5.0, "hea.": 5.0}
    fit(module, lambda _: sum(module.parameters()).sum(), 2, training, tmp_path, seed=0, rates=rates)
    # With a constant gradient, AdamW moves by the rate: 2/2 and then 1/2 of it. Single precision near 1.
    assert module["encoder"][0].item() == pytest.approx(1 - 0.1 - 0.05, abs=1e-6)
    assert module["head"][0].item() == pytest.approx(1 - 0.01 - 0.005, abs=1e-6)


@pytest.mark.parametrize("name", ["pooled", "cross"])
def test_an_interrupted_training_goes_on_and_ends_with_the_same_weights(name, tiny, encoded, tmp_path):
    whole = built(name, tiny(), encoded)
    history = train(whole, tmp_path / "whole", 6)
    parts = built(name, tiny(), encoded)
    compare, calls = parts["encoder"].compare, iter(range(1, 9))
    parts["encoder"].compare = lambda *asked: compare(*asked) if next(calls) < 4 else None  # fails in step 4
    with pytest.raises(TypeError):
        train(parts, tmp_path / "parts", 6, every=0.0)
    again = built(name, tiny(), encoded)
    assert train(again, tmp_path / "parts", 6, every=0.0) == history
    assert same(copied(again), copied(whole))


@pytest.mark.parametrize("name", ["pooled", "bi", "cross"])
def test_half_precision_gives_scores_near_those_of_single_precision_and_a_finite_loss(
    name, tiny, encoded, tmp_path
):
    coarse = Finetuning(learning_rate=1e-3, precision="bfloat16")
    modules = [built(name, tiny(), encoded, settings).eval() for settings in (OWN, coarse)]
    split, rows = encoded.splits["train"], torch.arange(40)
    with torch.no_grad():
        scores, sides, _ = zip(*(m["encoder"].compare(m["head"], split, rows) for m in modules), strict=True)
    assert (sides[0] - sides[1]).abs().max() > 1e-4
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=0.05)  # 8 bits of mantissa
    history = train(modules[1], tmp_path, 2)
    assert all(math.isfinite(epoch["loss"]) for epoch in history)
    assert {parameter.dtype for parameter in modules[1].parameters()} == {torch.float32}


# --- settings of the objective ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["low_rank", "full", "hadamard", "concat", "pooled"])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_sides_of_a_row_share_the_dropout_of_a_condition_or_not(name, frozen, tiny, encoded):
    split = replace(encoded.splits["train"], second=encoded.splits["train"].first)  # twice the same sentence
    similarity = {}
    for sides in ("shared", "apart"):
        module = built(name, tiny(), encoded, dropout_sides=sides, dropout=0.5)
        module["encoder"].eval()  # its own dropout off
        source = module["encoder"].encoded(tokens=True) if frozen else module["encoder"]
        with torch.no_grad():
            for training in (True, False):
                head = module["head"].train(training)
                similarity[sides, training] = source.compare(head, split, torch.arange(20))[0]
    assert (similarity["apart", True] < 0.9999).all()
    for case in (("shared", True), ("shared", False), ("apart", False)):
        torch.testing.assert_close(similarity[case], torch.ones(20), **BATCHING)


def test_smoothing_and_a_teacher_move_the_target_and_leave_the_comparisons(encoded, tiny):
    label, teacher = encoded.splits["train"].label, torch.linspace(-1, 1, 40)
    module = built("hadamard", tiny(), encoded, smoothing=0.2, teacher="cross", teacher_share=0.25)
    plain = PairLoss(module["head"], module["encoder"])
    taught = PairLoss(module["head"], module["encoder"], teacher=teacher)
    # Labels 0 and 1 become 0.1 and 0.9; a quarter of the teacher's score joins three quarters of that.
    expected = [0.1 + 0.8 * value for value in label.tolist()]
    assert plain.target.tolist() == pytest.approx(expected)
    mixed = [0.75 * one + 0.25 * other for one, other in zip(expected, teacher.tolist(), strict=True)]
    assert taught.target.tolist() == pytest.approx(mixed, abs=1e-6)
    module.eval()
    with torch.no_grad():
        found, other = (loss(torch.arange(20)).item() for loss in (taught, plain))
        cosine = head_scores(module["head"], module["encoder"], encoded.splits["train"])
    squares = [((cosine - torch.tensor(target)) ** 2).mean().item() for target in (mixed, expected)]
    assert found - other == pytest.approx(squares[0] - squares[1], abs=1e-5)  # single precision


def recipe_of(*models: dict, **changes) -> HyperCLRecipe:
    content = {
        "data": DATA,
        "training": {"epochs": 1, "batch_size": 10, "learning_rate": 3e-3},
        "models": [{"name": model["kind"], **model} for model in models],
        "reference": models[0].get("name", models[0]["kind"]),
    }
    return load_recipe("hyper_cl_bundled_tiny", {**content, **changes})


GATE, PUPIL = {"kind": "hadamard"}, {"name": "pupil", "kind": "hyper", "rank": 4, "teacher": "hadamard"}
BI, CROSS, COSINE = ({"kind": kind} for kind in ("bi_encoder", "cross_encoder", "cosine"))


@pytest.mark.parametrize(
    ("models", "tuning", "message"),
    [
        ([BI], None, "bi_encoder trains its encoder; add finetuning"),
        ([CROSS], None, "cross_encoder trains its encoder; add finetuning"),
        ([{**CROSS, "same_condition": 1.0}], {}, "a cross_encoder has no embeddings for same_condition"),
        ([PUPIL, GATE], {}, "its teacher 'hadamard' must stand before it"),
        ([{**GATE, "teacher": "hadamard"}], {}, "its teacher 'hadamard' must stand before it"),
        ([COSINE, {**PUPIL, "teacher": "cosine"}], {}, "its teacher 'cosine' is not trained"),
        ([{**BI, "pooling": "condition"}], {}, "kind bi_encoder has no pooling to learn"),
        ([GATE], {"learning_rate": 0.0}, "learning_rate"),
        ([GATE], {"precision": "float16"}, "precision"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(models, tuning, message):
    with pytest.raises(ValueError, match=message):
        recipe_of(*models, finetuning=tuning if tuning is None else {"learning_rate": 1e-3, **tuning})


# --- a whole comparison -------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
def test_a_comparison_keeps_encoders_that_give_its_scores_and_is_not_trained_twice(
    normalise, tiny, tables, tmp_path, monkeypatch
):
    encoder = tiny("roberta", "cls")
    models = [COSINE, CROSS, BI, GATE, {"name": "pooled", **KINDS["pooled"], "teacher": "cross_encoder"}]
    tuning = {"learning_rate": 1e-3, "normalise": normalise}
    recipe = recipe_of(*models, encoder=encoder.name, finetuning=tuning, seeds=[3, 4])
    store = EmbeddingStore(encoder, tmp_path / "cache", tokens=hyper_cl_comparison.needs_tokens(recipe))
    first = hyper_cl_comparison.compare(recipe, tables, store, tmp_path, "cpu")
    assert not store.tokens
    assert len(first.cards) == 1 + 4 * 2
    # Joint readers cannot be asked with a condition of one's own, so only heads are kept.
    assert sorted(folder.name for folder in (tmp_path / "models").iterdir()) == ["hadamard", "pooled"]

    test = tables["test"]
    for name in ("hadamard", "pooled"):
        kept = HyperCL.load(tmp_path / "models" / name)
        assert kept.encoder.pooling == "cls"
        assert kept.unit == normalise
        assert kept.encoder.fingerprint != encoder.fingerprint
        scores = first.scores.filter(model=name, seed=3, split="test").sort("row")["score"].to_list()
        for row in (0, 9, 39):
            one, other, condition = test.select("sentence1", "sentence2", "condition").row(row)
            again = kept.similarity([one], [other], condition).item()
            # Other batches; token states rounded to half precision may fall to either side.
            assert scores[row] == pytest.approx(again, abs=1e-4 if name == "hadamard" else 2e-3)

    monkeypatch.setattr(hyper_cl_comparison, "fit", None)  # a training would fail
    again = hyper_cl_comparison.compare(recipe, tables, store, tmp_path, "cpu")
    assert again.scores.equals(first.scores)
    assert again.cards == first.cards
