"""Which words moved a conditioned score: of the sentences, of the condition, and which pair of words.

The path from a word to the score leads through the encoder, the pooling and the generated projection, for a
condition's words through the generator too. The reference is the same text with every word replaced by the
padding token; special tokens stay, so they add nothing.

Shape letters: S rows, L tokens of a sentence, M tokens of a condition, W words, D width, C condition width.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from workbench.conditions import normalise_condition, normalise_text
from workbench.errors import DataError
from workbench.geometry.attribution import (
    STEPS,
    Attribution,
    PairAttribution,
    integrated_gradients,
    siamese_attribution,
)
from workbench.hypernetworks import Rows
from workbench.hypernetworks.generators import token_scale
from workbench.model import HyperCL
from workbench.papers.hyper_cl import Batch


@dataclass(frozen=True)
class Words:
    """A text as the encoder's input vectors, and the words they belong to.

    Attributes:
        words: as written.
        owner: which word each token is part of; for a special token, the number of words.
        parts: input vectors of the tokens, before positions are added.
        reference: the same, every word's tokens replaced by padding.
    """

    words: list[str]
    owner: Int[Tensor, " L"]
    parts: Float[Tensor, "L D"]
    reference: Float[Tensor, "L D"]

    def by_word(self, values: Float[Tensor, " L *rest"]) -> Float[Tensor, " W *rest"]:
        """Sum what the tokens of each word add; special tokens are left out."""
        sums = values.new_zeros(len(self.words) + 1, *values.shape[1:])
        return sums.index_add(0, self.owner, values)[:-1]

    @property
    def silent(self) -> "Words":
        """The reference as a text."""
        return replace(self, parts=self.reference)

    def without(self, words: list[int]) -> "Words":
        """Return the text with some words, by their places, cut out."""
        kept = ~torch.isin(self.owner, torch.tensor(words, dtype=torch.long, device=self.owner.device))
        return replace(self, owner=self.owner[kept], parts=self.parts[kept], reference=self.reference[kept])


class WordAttribution:
    """Attributes scores of a model to words, where it computes; holds a copy of its encoder's network."""

    def __init__(self, model: HyperCL) -> None:
        """Take a trained model; its head may be any that reads texts as conditions.

        Raises:
            DataError: an encoder that is no transformer.
        """
        self.model, encoder = model, model.encoder
        if not hasattr(encoder.model[0], "auto_model"):
            raise DataError(f"encoder {encoder.name} is no transformer, so no score can be followed to words")
        self.transformer = copy.deepcopy(encoder.model[0].auto_model).float()
        # The fused kernels have no forward-mode derivative.
        self.transformer.set_attn_implementation("eager")
        self.after = list(encoder.model.children())[1:]

    # --- texts ----------------------------------------------------------------------------------------------

    def words(self, text: str, condition: bool = False) -> Words:
        """Read a sentence or a condition.

        Raises:
            DataError: an unusable text.
        """
        text = normalise_condition(text) if condition else normalise_text(text, "the text")
        tokenizer, window = self.model.encoder.model.tokenizer, self.model.encoder.window
        read = tokenizer(text, truncation=True, max_length=window)
        places = read.word_ids(0)
        spans = [
            read.word_to_chars(place) for place in sorted({place for place in places if place is not None})
        ]
        table = self.transformer.get_input_embeddings().weight.detach()
        owned = [len(spans) if place is None else place for place in places]
        owner = torch.tensor(owned, device=table.device)
        parts = table[torch.tensor(read["input_ids"], device=table.device)]
        reference = torch.where(owner[:, None] < len(spans), table[tokenizer.pad_token_id], parts)
        return Words([text[span.start : span.end] for span in spans], owner, parts, reference)

    def _read(self, parts: Float[Tensor, "S L D"]) -> tuple[Float[Tensor, "S D"], Float[Tensor, "S L D"]]:
        """Run the encoder from its input vectors on: sentence vectors as it gives them, and token states."""
        mask = torch.ones(parts.shape[:2], dtype=torch.long, device=parts.device)
        states = self.transformer(inputs_embeds=parts, attention_mask=mask).last_hidden_state
        features = {"token_embeddings": states, "attention_mask": mask}
        for module in self.after:
            features = module(features)
        sentences = features["sentence_embedding"]
        return functional.normalize(sentences, dim=-1) if self.model.encoder.unit else sentences, states

    def _conditions(self, parts: Float[Tensor, "S M D"]) -> Float[Tensor, "S C"]:
        return self.model.scaled(self._read(parts)[0])

    def _vectors(
        self, sentences: Float[Tensor, "S L D"], conditions: Float[Tensor, "U C"]
    ) -> Float[Tensor, "N D"]:
        """Embed sentences, each under its own condition, or one of either with all others; unit norm."""
        rows = torch.arange(max(len(sentences), len(conditions)), device=sentences.device)
        by_sentence, by_condition = Rows.of(rows % len(sentences)), Rows.of(rows % len(conditions))
        pooled, states = self._read(sentences)
        tokens = mask = None
        if self.model.store.tokens:
            tokens = token_scale(states)[by_sentence.unique]
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        batch = Batch(
            self.model.scaled(pooled)[by_sentence.unique], tokens, mask, by_sentence,
            conditions[by_condition.unique], by_condition,
        )  # fmt: skip
        return functional.normalize(self.model.head(batch), dim=-1)

    # --- scores ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, first: Words, second: Words, condition: Words) -> float:
        """Cosine of two sentences under a condition, -1 to 1, for example with words left out."""
        asked = self._conditions(condition.parts[None])
        one, other = (self._vectors(side.parts[None], asked)[0] for side in (first, second))
        return float(one @ other)

    def of_condition(
        self, first: str, second: str, condition: str, steps: int = STEPS,
        told: Callable[[int], None] = lambda _: None,
    ) -> tuple[Words, Attribution]:  # fmt: skip
        """Attribute the score to the condition's words, values one per word.

        Args:
            first: a sentence.
            second: the one it is compared with.
            condition: whose words are asked about.
            steps: of the integral.
            told: as :func:`workbench.geometry.attribution.integrated_gradients` takes it.

        Raises:
            DataError: an unusable text.
        """
        asked = self.words(condition, condition=True)
        sides = [self.words(text).parts[None] for text in (first, second)]

        def score(parts: Float[Tensor, "S M D"]) -> Float[Tensor, " S"]:
            conditions = self._conditions(parts)
            one, other = (self._vectors(side, conditions) for side in sides)
            return (one * other).sum(1)

        found = integrated_gradients(score, asked.parts, asked.reference, steps, told)
        return asked, replace(found, values=asked.by_word(found.values).cpu())

    def of_sentence(
        self, first: str, second: str, condition: str, steps: int = STEPS,
        told: Callable[[int], None] = lambda _: None,
    ) -> tuple[Words, Attribution]:  # fmt: skip
        """Attribute the score to the first sentence's words; arguments as for :meth:`of_condition`."""
        moved = self.words(first)
        with torch.no_grad():
            conditions = self._conditions(self.words(condition, condition=True).parts[None])
            other = self._vectors(self.words(second).parts[None], conditions)[0]
        found = integrated_gradients(
            lambda parts: self._vectors(parts, conditions) @ other, moved.parts, moved.reference, steps, told
        )
        return moved, replace(found, values=moved.by_word(found.values).cpu())

    def of_pair(
        self, first: str, second: str, condition: str, steps: int = 50
    ) -> tuple[Words, Words, PairAttribution]:
        """Attribute the score to pairs of words, one of each sentence; see :meth:`of_condition`."""
        one, other = self.words(first), self.words(second)
        with torch.no_grad():
            conditions = self._conditions(self.words(condition, condition=True).parts[None])
        found = siamese_attribution(
            lambda parts: self._vectors(parts, conditions),
            (one.parts, one.reference),
            (other.parts, other.reference),
            steps,
        )
        return one, other, replace(found, values=other.by_word(one.by_word(found.values).T).T.cpu())

    def deletion(
        self, first: str, second: str, condition: str, pairs: int = 5, draws: int = 5, seed: int = 0,
        steps: int = 4,
    ) -> tuple[float, float, float]:  # fmt: skip
        """Cut out the words of the strongest pairs, and as many of either sentence drawn at random.

        Args:
            first: a sentence.
            second: the one it is compared with.
            condition: under which.
            pairs: of words that raise the score most, at least 1; they may share words. Where they cover
                every word of both sentences, drawn words are the same.
            draws: at random, at least 1, whose mean counts.
            seed: of the draws.
            steps: of the integral, at least 1; here it only has to order the pairs.

        Returns:
            The cosine (-1 to 1) of the whole sentences, without the strongest words, and without drawn ones;
            the second is to lie below the third.

        Raises:
            DataError: an unusable text.

        Source: Moeller, Nikolaev and Pado (2023), arXiv 2310.05703, whose attributions are put to this test.
        """
        one, other, found = self.of_pair(first, second, condition, steps)
        asked, draw = self.words(condition, condition=True), torch.Generator().manual_seed(seed)
        order = found.values.flatten().argsort(descending=True)[:pairs]
        strongest = [places.unique().tolist() for places in torch.unravel_index(order, found.values.shape)]

        def without(words: list[list[int]]) -> float:
            return self.score(
                *(side.without(own) for side, own in zip((one, other), words, strict=True)), asked
            )

        drawn = [
            without([torch.randperm(size, generator=draw)[: len(own)].tolist()
                     for size, own in zip(found.values.shape, strongest, strict=True)])
            for _ in range(draws)
        ]  # fmt: skip
        return self.score(one, other, asked), without(strongest), sum(drawn) / draws
