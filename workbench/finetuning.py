"""A text encoder in training: token ids in, pooled vectors and token states out. It knows no paper.

Texts are tokenised once, read in blocks of like length, and each wanted text once per call.

Shape letters: N texts wanted, U texts of a table, T tokens of all texts, L tokens of the longest, D width.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from workbench.config import Settings
from workbench.encoders import TextEncoder, TokenStates, ragged_rows
from workbench.hypernetworks.generators import standardise

READ_AT_ONCE = 256  # texts a forward pass takes outside training


class Finetuning(Settings):
    """How the encoder itself is trained; a recipe without it keeps the encoder frozen."""

    learning_rate: float = Field(gt=0, description="of the encoder; training.learning_rate is the heads'")
    pooling: Literal["own", "cls", "mean"] = Field(default="own", description="own: as the encoder comes")
    normalise: bool = Field(
        default=True,
        description="unit variance before the head; false: hidden states as they are, as published",
    )
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class TokenIds:
    """Tokenised texts of unequal length, end to end; text n owns ``offsets[n]`` to ``offsets[n + 1]``."""

    ids: Int[Tensor, " T"]
    types: Int[Tensor, " T"]
    offsets: Int[Tensor, " U_plus_1"]

    @classmethod
    def of(
        cls, encoder: TextEncoder, texts: list[str] | list[tuple[str, str]], device: str | torch.device
    ) -> "TokenIds":
        """Tokenise texts, or pairs of texts, cut to the encoder's window."""
        first, second = (texts, None) if isinstance(texts[0], str) else map(list, zip(*texts, strict=True))
        found = encoder.model.tokenizer(first, second, truncation=True, max_length=encoder.window)
        lengths = torch.tensor([0, *map(len, found["input_ids"])])
        # Encoders without segments (RoBERTa) have no token types.
        types = found.get("token_type_ids") or [[0] * len(ids) for ids in found["input_ids"]]
        ids, types = (
            torch.tensor([value for row in rows for value in row]) for rows in (found["input_ids"], types)
        )
        return cls(ids.to(device), types.to(device), lengths.cumsum(0).to(device))

    def __len__(self) -> int:
        """Number of texts U."""
        return len(self.offsets) - 1

    def padded(
        self, texts: Int[Tensor, " N"]
    ) -> tuple[Int[Tensor, "N L"], Int[Tensor, "N L"], Bool[Tensor, "N L"]]:
        """Gather texts into one block as long as the longest: ids, types and a mask of real tokens."""
        rows, mask = ragged_rows(self.offsets, texts)
        return self.ids[rows] * mask, self.types[rows] * mask, mask


class Reader(nn.Module):
    """A transformer in training: token ids in, pooled vectors and token states out."""

    def __init__(self, encoder: TextEncoder, settings: Finetuning) -> None:
        """Copy the encoder's transformer, so that every model of a recipe starts from the same weights."""
        super().__init__()
        self.transformer = copy.deepcopy(encoder.model[0].auto_model).requires_grad_(True)
        # At a few dozen tokens the plain kernel beats the fused one on a CPU, whose backward pass is slow.
        self.transformer.set_attn_implementation("eager" if encoder.model.device.type == "cpu" else "sdpa")
        for parameter in getattr(getattr(self.transformer, "pooler", None), "parameters", list)():
            parameter.requires_grad_(False)  # unused: the sentence vector is pooled from the last layer
        self.precision = getattr(torch, settings.precision)
        self.normalise = settings.normalise
        self.pooling = encoder.pooling if settings.pooling == "own" else settings.pooling
        self.typed = "token_type_ids" in encoder.model.tokenizer.model_input_names

    def forward(
        self, texts: TokenIds, wanted: Int[Tensor, " N"], tokens: bool = False
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N L D"] | None, Bool[Tensor, "N L"] | None]:
        """Read texts in a few blocks of like length.

        Args:
            texts: the table.
            wanted: which rows of it, each once.
            tokens: also return the token states.

        Returns:
            Pooled vectors and, if asked for, token states (zero after a text's end) with their mask.
        """
        lengths = texts.offsets[wanted + 1] - texts.offsets[wanted]
        order = torch.argsort(lengths, stable=True)
        # Padding costs more than a call does on a CPU; an accelerator prefers one call.
        blocks = max(1, min(4, len(wanted) // 12)) if wanted.device.type == "cpu" else 1
        pooled, states, masks, longest = [], [], [], int(lengths.max())
        for part in order.tensor_split(blocks):
            ids, types, mask = texts.padded(wanted[part])
            with torch.autocast(wanted.device.type, self.precision, enabled=self.precision != torch.float32):
                extra = {"token_type_ids": types} if self.typed else {}
                found = self.transformer(input_ids=ids, attention_mask=mask.long(), **extra).last_hidden_state
            found = found.float() * mask[..., None]
            pooled.append(self._pool(found, mask))
            if tokens:
                spare = longest - found.shape[1]
                states.append(functional.pad(found, (0, 0, 0, spare)))
                masks.append(functional.pad(mask, (0, spare)))
        back = torch.argsort(order)
        sentences = torch.cat(pooled)[back]
        if not tokens:
            return sentences, None, None
        return sentences, torch.cat(states)[back], torch.cat(masks)[back]

    def _pool(self, states: Float[Tensor, "N L D"], mask: Bool[Tensor, "N L"]) -> Float[Tensor, "N D"]:
        pooled = states[:, 0] if self.pooling == "cls" else states.sum(1) / mask.sum(1, keepdim=True)
        return standardise(functional.normalize(pooled, dim=-1)) if self.normalise else pooled

    @torch.inference_mode()
    def read_all(self, texts: TokenIds, tokens: bool) -> tuple[Float[Tensor, "U D"], TokenStates | None]:
        """Read a whole table, each text once, sorted by length."""
        lengths = texts.offsets.diff()
        order = torch.argsort(lengths)
        pooled, states = [], []
        for part in order.split(READ_AT_ONCE):
            found, block, mask = self(texts, part, tokens)
            pooled.append(found)
            states += [row[own].half() for row, own in zip(block, mask, strict=True)] if tokens else []
        back = torch.argsort(order)
        if not tokens:
            return torch.cat(pooled)[back], None
        return torch.cat(pooled)[back], TokenStates(
            torch.cat([states[row] for row in back.tolist()]), texts.offsets
        )

    def save(self, encoder: TextEncoder, folder: Path) -> None:
        """Write the trained transformer as a sentence-transformers folder, with the encoder's tokenizer.

        Args:
            encoder: the one this reader was copied from.
            folder: made if it is not there.
        """
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

        transformer = copy.copy(encoder.model[0])
        transformer._modules = {**encoder.model[0]._modules, "model": self.transformer}
        width = self.transformer.config.hidden_size
        modules = [transformer, Pooling(width, self.pooling), *([Normalize()] if self.normalise else [])]
        SentenceTransformer(modules=modules).save_pretrained(str(folder), safe_serialization=True)
