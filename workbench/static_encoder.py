"""A table of word vectors distilled from a sentence encoder: a text is the mean of its tokens' vectors.

No network runs when a text is encoded, so it is hundreds of times as fast as its teacher; word order is lost.

Shape letters: N texts, T tokens of all texts, V vocabulary, D the teacher's width, K kept width.
"""

from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load, save
from sklearn.linear_model import Ridge
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from workbench.encoders import TextEncoder
from workbench.errors import DataError, RunError
from workbench.files import write_atomic
from workbench.geometry.whitening import moments_of

_AT_ONCE = 512  # texts whose token states are held together
_PENALTY = 1.0  # of the two regressions, in units of summed squares


class StaticEncoder:
    """Texts in, unit-norm vectors out, by one look-up per token.

    e(x) = u / |u|, u = mean over the tokens t of x of v_t.

    See :meth:`distil` for where the table v comes from, and its source.
    """

    def __init__(self, tokenizer: Tokenizer, table: Float[Tensor, "V K"]) -> None:
        """Join a tokenizer and its table.

        Args:
            tokenizer: whose token numbers are rows of the table.
            table: one vector per token.
        """
        self.tokenizer, self.table = Tokenizer.from_str(tokenizer.to_str()), table
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        added = self.tokenizer.get_added_tokens_decoder()
        self._special = {number for number, token in added.items() if token.special}

    @classmethod
    def distil(
        cls, teacher: TextEncoder, texts: list[str], *, removed: int = 1, kept: int = 256, mapped: bool = True
    ) -> "StaticEncoder":
        """Distil a table from a sentence encoder; texts need no labels.

        A token's vector is the mean of its states in the texts' contexts. Principal components are those of
        averaged sentences, not of tokens: the first say what all sentences share and go, the last are noise
        and go too. Tokens that no text has get what a linear map of the teacher's input vectors, fitted on
        those that were seen, says of them.

        Args:
            teacher: a sentence encoder that pools token states by their mean.
            texts: some thousands of ordinary sentences.
            removed: principal components taken out from the first on.
            kept: width K of the table, after those.
            mapped: also turn the averages into the teacher's sentence vectors as far as a linear map can,
                which then gives the table the teacher's width.

        Raises:
            DataError: texts too few for that many components.

        Source: Wada et al. (2025), Static Word Embeddings for Sentence Semantic Representation, arXiv
        2506.04624 (sentence-level PCA). Deviation: their last step, distilling by gradient descent, is a
        ridge regression here.
        """
        student = cls(teacher.model.tokenizer.backend_tokenizer, torch.zeros(0, teacher.width))
        student.table = _contextual(teacher, texts)
        sentences = student.average(texts)
        if len(texts) <= removed + kept or removed + kept > teacher.width:
            raise DataError(
                f"{removed} + {kept} components need more texts than that and at most the teacher's width "
                f"{teacher.width}, got {len(texts)} texts; give more texts or keep fewer"
            )
        found = moments_of(sentences)
        directions = torch.linalg.eigh(found.covariance).eigenvectors.flip(1)[:, removed : removed + kept]
        student.table = ((student.table.double() - found.mean) @ directions).float()
        if mapped:
            target = teacher.encode(texts)
            fitted = Ridge(alpha=_PENALTY, fit_intercept=False).fit(
                student.average(texts), target - target.mean(0)
            )
            student.table = student.table @ torch.from_numpy(fitted.coef_.T).float()
        return student

    @property
    def width(self) -> int:
        """Embedding width K."""
        return self.table.shape[1]

    def tokens(self, texts: list[str]) -> tuple[Int[Tensor, " T"], Int[Tensor, " N"]]:
        """Return the tokens of texts end to end, special ones left out, and where each text starts."""
        found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        # The token for what the vocabulary does not hold is special, too.
        read = [[number for number in one.ids if number not in self._special] for one in found]
        lengths = torch.tensor([len(ids) for ids in read], dtype=torch.long)
        return torch.tensor(list(chain.from_iterable(read)), dtype=torch.long), lengths.cumsum(0) - lengths

    def average(self, texts: list[str]) -> Float[Tensor, "N K"]:
        """Return the mean vector of each text's tokens, not normalised; zero for a text without tokens."""
        ids, starts = self.tokens(texts)
        return functional.embedding_bag(ids, self.table, starts, mode="mean")

    def encode(self, texts: list[str]) -> Float[Tensor, "N K"]:
        """Encode texts, norm 1; a text without tokens is zero."""
        return functional.normalize(self.average(texts), dim=-1)

    def save(self, folder: Path) -> None:
        """Write table and tokenizer as safetensors and JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "tokenizer.json", self.tokenizer.to_str().encode())
        write_atomic(folder / "table.safetensors", save({"table": self.table.contiguous()}))

    @classmethod
    def load(cls, folder: Path) -> "StaticEncoder":
        """Open what :meth:`save` wrote.

        Raises:
            RunError: a file is missing or damaged, or they do not belong together.
        """
        try:
            table = load((folder / "table.safetensors").read_bytes())["table"]
            tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text("utf-8"))
            if table.ndim != 2 or len(table) < tokenizer.get_vocab_size() or not torch.isfinite(table).all():
                raise ValueError(f"the table of shape {tuple(table.shape)} does not fit its tokenizer")
        except Exception as problem:  # a damaged tokenizer raises a plain Exception
            raise RunError(f"{folder} holds no usable word table: {problem}. Distil it again") from problem
        return cls(tokenizer, table)


def _contextual(teacher: TextEncoder, texts: list[str]) -> Float[Tensor, "V D"]:
    """Average each token's states over its contexts; guess those of tokens that the texts do not have."""
    tokenizer = teacher.model.tokenizer
    inputs = teacher.model[0].auto_model.get_input_embeddings().weight.detach().float().cpu()
    sums, counts = torch.zeros(inputs.shape[0], teacher.width), torch.zeros(len(inputs))
    for start in range(0, len(texts), _AT_ONCE):
        part = texts[start : start + _AT_ONCE]
        read = tokenizer(part, truncation=True, max_length=teacher.window)["input_ids"]
        _, states = teacher.encode_with_tokens(part)
        ids = torch.tensor(list(chain.from_iterable(read)))
        sums.index_add_(0, ids, torch.cat(states).float())
        counts += torch.bincount(ids, minlength=len(inputs))
    counts[tokenizer.all_special_ids] = 0
    seen = counts > 0
    table = torch.where(seen[:, None], sums / counts.clamp(min=1)[:, None], 0)
    # A token seen once is one context's; how often it was seen is how much it says of the map.
    fitted = Ridge(alpha=_PENALTY).fit(inputs[seen].numpy(), table[seen].numpy(), counts[seen].numpy())
    table[~seen] = torch.from_numpy(fitted.predict(inputs[~seen].numpy())).float()
    return table
