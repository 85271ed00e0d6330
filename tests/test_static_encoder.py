"""The static encoder: averages by hand, distillation from the real encoder, and what it keeps of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.nn.functional import normalize

from workbench.datasets.bundled import sentences
from workbench.errors import DataError, RunError
from workbench.static_encoder import StaticEncoder

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=30, deadline=None, database=None)


def by_hand() -> StaticEncoder:
    tokenizer = Tokenizer(WordLevel({"cat": 0, "dog": 1, "runs": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    return StaticEncoder(tokenizer, torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 4.0], [0.0, 0.0]]))


def test_a_text_is_the_mean_of_its_words_brought_to_norm_one():
    # ((3, 0) + (1, 4)) / 2 = (2, 2); ((0, 1) + (0, 1)) / 2 = (0, 1).
    encoder = by_hand()
    torch.testing.assert_close(
        encoder.average(["cat runs", "dog dog"]), torch.tensor([[2.0, 2.0], [0.0, 1.0]])
    )
    torch.testing.assert_close(encoder.encode(["cat runs"]), torch.full((1, 2), 0.5**0.5))


def test_a_text_without_known_words_is_zero_and_no_texts_give_no_rows():
    encoder = by_hand()
    assert encoder.encode(["", "zebra"]).abs().max() == 0
    assert encoder.encode([]).shape == (0, 2)


def test_special_tokens_have_no_share_in_the_mean():
    encoder = by_hand()
    encoder.tokenizer.add_special_tokens(["?"])
    known = StaticEncoder(encoder.tokenizer, encoder.table + 1)  # the row of "?" is (1, 1) now
    # "zebra" becomes "?", which is left out: ((4, 1) + (2, 5)) / 2 = (3, 3).
    torch.testing.assert_close(known.average(["cat zebra runs", "zebra"]), torch.tensor([[3.0, 3.0], [0, 0]]))


@quick
@given(st.lists(st.sampled_from(["cat", "dog", "runs"]), min_size=1, max_size=8), st.randoms())
def test_the_order_of_words_and_repeating_a_text_change_nothing(words, random):
    encoder, moved = by_hand(), list(words)
    random.shuffle(moved)
    found = encoder.encode([" ".join(words), " ".join(moved), " ".join(words * 2)])
    torch.testing.assert_close(found, found[:1].expand(3, -1))


def test_a_table_is_written_and_opened_again(tmp_path):
    by_hand().save(tmp_path / "table")
    opened = StaticEncoder.load(tmp_path / "table")
    assert torch.equal(opened.encode(["cat runs dog"]), by_hand().encode(["cat runs dog"]))
    assert opened.width == 2


@pytest.mark.parametrize("damage", ["tokenizer.json", "table.safetensors"])
def test_a_damaged_table_is_refused_by_name(tmp_path, damage):
    by_hand().save(tmp_path)
    (tmp_path / damage).write_text("{")
    with pytest.raises(RunError, match="holds no usable word table"):
        StaticEncoder.load(tmp_path)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return sentences()["sentence"].to_list()


@pytest.fixture(scope="module")
def distilled(encoder, texts) -> StaticEncoder:
    return StaticEncoder.distil(encoder, texts[:240], kept=64)


def test_a_distilled_table_orders_unseen_texts_much_as_its_teacher_does(encoder, texts, distilled):
    unseen = texts[240:]
    pairs = torch.triu_indices(len(unseen), len(unseen), offset=1)

    def cosines(rows: torch.Tensor) -> np.ndarray:
        return (rows[pairs[0]] * rows[pairs[1]]).sum(1).numpy()

    teacher = cosines(encoder.encode(unseen))
    own = spearmanr(cosines(distilled.encode(unseen)), teacher).statistic
    assert own > 0.4  # 240 short texts are few; with 3,000 it reaches 0.88 of the teacher's score on STS-B
    # The teacher's own input vectors, averaged without any distilling, are the control.
    inputs = encoder.model[0].auto_model.get_input_embeddings().weight.detach()
    plain = StaticEncoder(distilled.tokenizer, inputs)
    assert own > spearmanr(cosines(plain.encode(unseen)), teacher).statistic + 0.1


def test_words_that_no_training_text_has_are_placed_near_words_like_them(distilled):
    texts = ["violin", "cello", "algebra"]
    first, near, far = normalize(distilled.encode(texts), dim=1)
    assert float(first @ near) > float(first @ far)


def test_more_components_than_texts_are_refused(encoder):
    with pytest.raises(DataError, match="need more texts"):
        StaticEncoder.distil(encoder, ["a cat", "a dog", "a bus"], kept=64)
