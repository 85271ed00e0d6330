"""Hyper-CL with the encoder itself in training: the tri-encoder, and the joint readers it is held against.

A tri-encoder reads first sentences, second sentences and conditions apart, with one shared encoder; sentences
and conditions are batched apart and by length, and each unique text is read once per batch. A bi-encoder
reads every sentence together with its condition, a cross-encoder both sentences and the condition: they see
more and cost more, |S| x |C| readings where a tri-encoder needs |S| + |C|.

Each class here stands where :class:`workbench.papers.hyper_cl.Encoded` stands for a frozen encoder: the head,
the objective and the scores are the same.

Source: Hyper-CL sections 2 and 4.1; Deshpande et al. (2023), C-STS, section 4 (bi-, tri- and cross-encoder).

Shape letters: N rows, U unique texts, L tokens, D width.
"""

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from workbench.encoders import TextEncoder
from workbench.finetuning import Finetuning, Reader, TokenIds
from workbench.hypernetworks import Rows
from workbench.hypernetworks.generators import token_scale
from workbench.papers.hyper_cl import (
    Batch,
    Compared,
    ConditionedHead,
    Encoded,
    Split,
    compare_sides,
)
from workbench.papers.hyper_cl_settings import JOINT, ModelSettings


class TriEncoder(nn.Module):
    """Sentences and conditions read apart by one encoder in training."""

    def __init__(self, encoder: TextEncoder, settings: Finetuning, frozen: Encoded) -> None:
        """Tokenise every unique text once; ``frozen`` has the texts and the splits."""
        super().__init__()
        self.reader, self.frozen, self.splits = Reader(encoder, settings), frozen, frozen.splits
        device = frozen.sentences.device
        self.sentences, self.conditions = (TokenIds.of(encoder, texts, device) for texts in frozen.texts)

    def batch(
        self, settings: ModelSettings, sentence: Int[Tensor, " N"], condition: Int[Tensor, " N"]
    ) -> Batch:
        """Read each sentence and each condition of the rows once."""
        by_sentence, by_condition = Rows.of(sentence), Rows.of(condition)
        sentences, tokens, mask = self.reader(
            self.sentences, by_sentence.unique, settings.pooling != "sentence"
        )
        if tokens is not None:
            tokens = token_scale(tokens)
        asked, place = torch.unique(by_condition.unique % len(self.conditions), return_inverse=True)
        known = settings.condition == "one_hot"
        features = self.frozen.one_hot[asked] if known else self.reader(self.conditions, asked)[0]
        return Batch(sentences, tokens, mask, by_sentence, features[place], by_condition)

    def compare(self, head: ConditionedHead, split: Split, rows: Int[Tensor, " N"]) -> Compared:
        """Score rows of a split; see :func:`workbench.papers.hyper_cl.compare_sides`."""
        return compare_sides(head, self.batch, len(self.conditions), split, rows)

    def encoded(self, tokens: bool) -> Encoded:
        """Read every unique text once and return the tables that a frozen encoder would have given."""
        sentences, states = self.reader.read_all(self.sentences, tokens)
        conditions, _ = self.reader.read_all(self.conditions, tokens=False)
        return replace(self.frozen, sentences=sentences, tokens=states, conditions=conditions)


class JointReader(nn.Module):
    """Bi- and cross-encoder: the encoder reads a sentence, or both, together with the condition."""

    def __init__(self, encoder: TextEncoder, settings: Finetuning, frozen: Encoded, kind: str) -> None:
        """Tokenise every distinct combination that a split holds, once.

        Args:
            encoder: to start from.
            settings: how it is trained.
            frozen: has the texts and the splits.
            kind: "bi_encoder" or "cross_encoder".
        """
        super().__init__()
        self.reader, self.splits, self.cross = (
            Reader(encoder, settings),
            frozen.splits,
            kind == "cross_encoder",
        )
        sentences, conditions = frozen.texts
        self.sentences, self.conditions = len(sentences), len(conditions)
        parts = frozen.splits.values()
        if self.cross:
            keys = [self._key(part.first, part.second, part.condition) for part in parts]
        else:
            sides = [(side, part.condition) for part in parts for side in (part.first, part.second)]
            keys = [self._key(None, side, condition) for side, condition in sides]
        self.known = torch.cat(keys).unique()
        separator = f" {encoder.model.tokenizer.sep_token} "
        texts = []
        for key in self.known.tolist():
            both, condition = divmod(key, self.conditions)
            first, second = divmod(both, self.sentences)
            read = [sentences[first], sentences[second]] if self.cross else [sentences[second]]
            texts.append((separator.join(read), conditions[condition]))
        self.texts = TokenIds.of(encoder, texts, frozen.sentences.device)
        width = frozen.sentences.shape[1]
        self.score = nn.Sequential(nn.Dropout(0.1), nn.Linear(width, 1)) if self.cross else None

    def _key(self, first: Tensor | None, second: Tensor, condition: Tensor) -> Int[Tensor, " N"]:
        """Number a combination; the texts are kept in the order of these numbers."""
        both = second if first is None else first * self.sentences + second
        return both * self.conditions + condition

    def batch(
        self, settings: ModelSettings, sentence: Int[Tensor, " N"], condition: Int[Tensor, " N"]
    ) -> Batch:
        """Read each distinct sentence-condition pair of the rows once."""
        rows = Rows.of(torch.searchsorted(self.known, self._key(None, sentence, condition)))
        read = self.reader(self.texts, rows.unique)[0]
        return Batch(read, None, None, rows, read, rows)

    def compare(self, head: ConditionedHead, split: Split, rows: Int[Tensor, " N"]) -> Compared:
        """Score rows: by cosine (bi-encoder), by a learned linear map of the joint vector (cross-encoder)."""
        if not self.cross:
            return compare_sides(head, self.batch, self.conditions, split, rows)
        keys = self._key(split.first[rows], split.second[rows], split.condition[rows])
        wanted, back = keys.unique(return_inverse=True)
        joint = self.reader(self.texts, torch.searchsorted(self.known, wanted))[0][back]
        return self.score(joint)[:, 0], joint, joint


def finetuned(
    encoder: TextEncoder, settings: Finetuning, frozen: Encoded, kind: str
) -> TriEncoder | JointReader:
    """Return a copy of the encoder, ready to be trained with a head of this kind."""
    if kind in JOINT:
        return JointReader(encoder, settings, frozen, kind)
    return TriEncoder(encoder, settings, frozen)
