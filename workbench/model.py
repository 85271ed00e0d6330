"""A trained head with its encoder: texts and a condition in, conditioned embeddings and weights out."""

import json
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from workbench.conditions import normalise_condition, normalise_text
from workbench.encoders import TextEncoder
from workbench.errors import DataError, RunError
from workbench.hypernetworks import GeneratedWeights, Rows
from workbench.hypernetworks.generators import standardise, token_scale
from workbench.manifests import cache_folder
from workbench.papers.hyper_cl import Batch, ConditionedHead, ModelSettings
from workbench.store import EmbeddingStore


class HyperCL:
    """Embeds sentences under a condition typed by a person.

    Texts and conditions are encoded once and kept in the embedding store; one condition's weights are
    generated once per call.
    """

    def __init__(self, head: ConditionedHead, encoder: TextEncoder, cache: Path | None = None) -> None:
        """Join a trained head and the encoder it was trained on."""
        self.head, self.encoder = head.eval(), encoder
        self.store = EmbeddingStore(
            encoder, cache or cache_folder(), tokens=head.settings.pooling != "sentence"
        )

    @classmethod
    def load(cls, folder: Path, encoder: TextEncoder | None = None) -> "HyperCL":
        """Load a head that a run kept.

        Args:
            folder: holds head.safetensors and head.json.
            encoder: an encoder that is open already; opened by the name in head.json if not given.

        Raises:
            RunError: a file is missing or damaged, holds NaN, or does not fit the head it describes.
        """
        try:
            about = json.loads((folder / "head.json").read_text("utf-8"))
            tensors = load_file(folder / "head.safetensors")
            head = ConditionedHead(
                ModelSettings(**about["settings"]), about["width"], about["condition_width"]
            )
            head.load_state_dict(tensors)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as problem:
            reason = " ".join(str(problem).split())[:300]
            raise RunError(
                f"{folder} holds no usable head: {reason}. Train it again with workbench run"
            ) from problem
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise RunError(f"{folder}: the weights hold NaN or infinity; train the model again")
        if about["settings"]["condition"] != "text":
            raise RunError(
                f"{folder}: this head knows conditions by number, not by text; load one trained on text"
            )
        return cls(head, encoder or TextEncoder(about["encoder"]))

    @torch.inference_mode()
    def weights(self, conditions: list[str]) -> GeneratedWeights:
        """Generate the weights of conditions, each once, in their order.

        Raises:
            DataError: a condition is empty, or this head generates no weights (a Hadamard gate, a shared
                map).
        """
        if self.head.generator is None:
            settings = self.head.settings
            raise DataError(f"model {settings.name} generates no weights; it is a {settings.kind} head")
        texts = [normalise_condition(condition) for condition in conditions]
        return self.head.generator(standardise(self.store.embed(texts)))

    @torch.inference_mode()
    def encode(self, texts: list[str], condition: str, strength: float = 1.0) -> Float[Tensor, "N D"]:
        """Embed texts under one condition.

        Args:
            texts: at least one.
            condition: what to look at.
            strength: 0 gives the plain encoder, 1 the trained model, in between a blend of the two unit
                vectors; up to 2 it goes on beyond the model.

        Returns:
            Unit-norm embeddings.

        Raises:
            DataError: no texts, an unusable text or condition, or a strength outside 0..2.
        """
        if not texts:
            raise DataError("no texts to encode; give at least one")
        if not 0 <= strength <= 2:
            raise DataError(
                f"strength must lie in 0..2 (0: plain encoder, 1: the trained model), got {strength}"
            )
        clean = [normalise_text(text, f"text {row}") for row, text in enumerate(texts)]
        plain = self.store.embed(clean)
        if strength == 0:
            return plain
        features = standardise(self.store.embed([normalise_condition(condition)]))
        rows = Rows.of(torch.arange(len(clean)))
        tokens = mask = None
        if self.store.tokens:
            tokens, mask = self.store.token_states(clean).padded(rows.unique)
            tokens = token_scale(tokens)
        one = Rows.of(torch.zeros(len(clean), dtype=torch.long))
        batch = Batch(standardise(plain)[rows.unique], tokens, mask, rows, features, one)
        conditioned = functional.normalize(self.head(batch), dim=-1)
        return functional.normalize((1 - strength) * plain + strength * conditioned, dim=-1)

    def similarity(
        self, first: list[str], second: list[str], condition: str, strength: float = 1.0
    ) -> Float[Tensor, "N M"]:
        """Cosine of every first text with every second one under a condition; -1 to 1."""
        return self.encode(first, condition, strength) @ self.encode(second, condition, strength).T
