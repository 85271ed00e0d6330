"""A trained head with its encoder: texts and a condition in, conditioned embeddings and weights out."""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from workbench.conditions import normalise_condition, normalise_text
from workbench.encoders import TextEncoder
from workbench.errors import DataError, RunError
from workbench.files import clear_disk_errors
from workbench.hypernetworks import GeneratedWeights, Rows
from workbench.hypernetworks.generators import standardise, token_scale
from workbench.manifests import cache_folder
from workbench.papers.comparison import fill_in
from workbench.papers.hyper_cl import Batch, ConditionedHead
from workbench.papers.hyper_cl_settings import ModelSettings
from workbench.store import EmbeddingStore

# One text, or several with weights: {"The colour.": 0.5, "The size.": 0.5}.
Condition = str | Mapping[str, float]
_AT_ONCE = 1024  # texts whose token states are held together
_TOLD = 64  # texts encoded before others get their turn
# Classes a saved model may name; anything else is refused before a line of it is imported.
_MODULES = {
    "sentence_transformers.base.modules.transformer.Transformer",
    "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "sentence_transformers.base.modules.normalize.Normalize",
}
_HEAD = "workbench.sentence_module.ConditionedModule"


@dataclass(frozen=True)
class Block:
    """Texts read together: which they are, and their token states if the head pools them."""

    place: Int[Tensor, " B"]
    rows: Rows
    tokens: Float[Tensor, "B L D"] | None
    mask: Bool[Tensor, "B L"] | None


@dataclass(frozen=True)
class Prepared:
    """Texts that are encoded, so that a new condition costs a few products and nothing is looked up."""

    plain: Float[Tensor, "N D"]
    blocks: Iterable[Block]

    def __len__(self) -> int:
        """Number of texts N."""
        return len(self.plain)


class HyperCL:
    """Embeds sentences under a condition typed by a person.

    Texts and conditions are encoded once and kept in the embedding store; one condition's weights are
    generated once per call. Wherever it computes (:meth:`to`), texts go in and what comes out is on the CPU.
    """

    def __init__(
        self, head: ConditionedHead, encoder: TextEncoder, cache: Path | None = None, unit: bool = True
    ) -> None:
        """Join a trained head and the encoder it was trained on.

        Args:
            head: trained.
            encoder: whose vectors it reads.
            cache: folder of the embedding store; the user's cache if not given.
            unit: whether the head expects embeddings of norm 1 brought to unit variance.
        """
        self.head, self.encoder, self.unit = head.eval(), encoder, unit
        self.store = EmbeddingStore(
            encoder, cache or cache_folder(), tokens=head.settings.pooling != "sentence"
        )

    @property
    def device(self) -> torch.device:
        """Where the head computes."""
        return next((one.device for one in self.head.parameters()), torch.device("cpu"))

    def to(self, device: torch.device | str) -> "HyperCL":
        """Compute on a device from now on, head and encoder; what was prepared before must be prepared again.

        Args:
            device: as torch names devices.
        """
        self.head.to(device)
        self.store.to(device)
        self.encoder.model.to(device)
        return self

    @classmethod
    def load(cls, folder: Path, encoder: TextEncoder | None = None) -> "HyperCL":
        """Load a head that a run kept.

        Args:
            folder: holds head.safetensors, head.json and, if it was trained too, the encoder.
            encoder: an encoder that is open already; opened by the name in head.json if not given.

        Raises:
            RunError: a file is missing or damaged, holds NaN, or does not fit the head it describes.
        """
        try:
            about = json.loads((folder / "head.json").read_text("utf-8"))
            head, name = _head_of(about, folder / "head.safetensors"), about["encoder"]
            unit = _unit_of(about)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as problem:
            reason = " ".join(str(problem).split())[:300]
            raise RunError(
                f"{folder} holds no usable head: {reason}. Train it again with workbench run"
            ) from problem
        if head.settings.condition != "text":
            raise RunError(
                f"{folder}: this head knows conditions by number, not by text; load one trained on text"
            )
        if encoder is None:
            tuned = folder / "encoder"
            encoder = TextEncoder(str(tuned) if tuned.is_dir() else name, unit=unit)
        return cls(head, encoder, unit=unit)

    # --- as an ordinary SentenceTransformer -----------------------------------------------------------------

    def sentence_transformer(self) -> "SentenceTransformer":  # noqa: F821
        """Return the model as one SentenceTransformer: ``encode(texts, condition=...)``, ``similarity``."""
        from sentence_transformers import SentenceTransformer

        from workbench.sentence_module import ConditionedModule

        settings = self.head.settings.model_dump(mode="json")
        module = ConditionedModule(
            settings, self.head.width, self.head.condition_width, self.unit, head=self.head
        )
        modules = [*self.encoder.model.children(), module.eval()]
        return SentenceTransformer(modules=modules, device=str(self.device))  # else it would move them

    def save_pretrained(self, folder: Path | str) -> Path:
        """Write the model as a sentence-transformers folder: encoder and head, safetensors, no pickle.

        ``SentenceTransformer(folder, trust_remote_code=True)`` opens it where the workbench is installed, and
        :meth:`from_pretrained` opens it without that flag.

        Raises:
            RunError: the folder cannot be written.
        """
        folder = Path(folder)
        with clear_disk_errors(folder):
            self.sentence_transformer().save_pretrained(str(folder), create_model_card=False)
        return folder

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: str = "cpu") -> "HyperCL":
        """Open a folder that :meth:`save_pretrained` wrote.

        Only classes of sentence-transformers' own text pipeline and the workbench's head are built, and only
        safetensors are read.

        Raises:
            RunError: not such a folder, another class in it, or weights that are damaged, NaN or a pickle.
        """
        folder = Path(folder)
        try:
            listed = json.loads((folder / "modules.json").read_text("utf-8"))
            kinds = [str(module["type"]) for module in listed]
            place = folder / listed[-1]["path"]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as problem:
            raise RunError(
                f"{folder} is not a saved model ({problem}); give a folder written by save_pretrained"
            ) from problem
        foreign = [kind for kind in kinds[:-1] if kind not in _MODULES]
        if foreign or kinds[-1] != _HEAD:
            raise RunError(
                f"{folder}/modules.json names {(*foreign, kinds[-1])[0]}, which is no class of a Hyper-CL "
                "model; it is not imported. Give a folder written by save_pretrained"
            )
        if not place.resolve().is_relative_to(folder.resolve()):
            raise RunError(f"{folder}/modules.json points outside its folder: {listed[-1]['path']}")
        try:
            about = json.loads((place / "head.json").read_text("utf-8"))
            head, unit = _head_of(about, place / "model.safetensors", prefix="head."), _unit_of(about)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as problem:
            reason = " ".join(str(problem).split())[:300]
            raise RunError(f"{place} holds no usable head: {reason}. Save the model again") from problem
        encoder = TextEncoder.of_folder(folder, listed[:-1], device, unit)
        return cls(head.to(device), encoder, unit=unit)

    # --- conditions -----------------------------------------------------------------------------------------

    def scaled(self, embedded: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Bring the encoder's vectors to the scale the head reads."""
        return standardise(embedded) if self.unit else embedded

    def condition_features(self, conditions: list[Condition]) -> Float[Tensor, "U C"]:
        """Return what the generator reads of each condition; weighted ones are summed.

        Generated coefficients are affine in this vector, so weights that sum to 1 interpolate the
        coefficients themselves.

        Raises:
            DataError: a condition is empty, or a weight is not a finite number.
        """
        rows = []
        for condition in conditions:
            parts = {condition: 1.0} if isinstance(condition, str) else dict(condition)
            if not parts or not all(abs(float(weight)) < float("inf") for weight in parts.values()):
                raise DataError(f"a weighted condition needs texts with finite weights, got {parts}")
            texts = [normalise_condition(text) for text in parts]
            weights = torch.tensor([float(weight) for weight in parts.values()])
            rows.append(weights @ self.scaled(self.store.embed(texts)))
        return torch.stack(rows)

    @torch.inference_mode()
    def weights(self, conditions: list[Condition]) -> GeneratedWeights:
        """Generate the weights of conditions, each once, in their order.

        Raises:
            DataError: a condition is empty, or this head generates no weights (a Hadamard gate, a shared
                map).
        """
        if self.head.generator is None:
            settings = self.head.settings
            raise DataError(f"model {settings.name} generates no weights; it is a {settings.kind} head")
        return self.head.generator(self.condition_features(conditions).to(self.device)).to("cpu")

    # --- texts under conditions -----------------------------------------------------------------------------

    def apart(self) -> "HyperCL":
        """Return the same model with a store of its own in memory: its texts leave no trace on disk."""
        other = copy.copy(self)
        other.store = self.store.apart()
        return other

    def reading(self, encoder: TextEncoder) -> "HyperCL":
        """Return the same head over another encoder of the same width; nothing it reads is kept on disk."""
        other = copy.copy(self)
        other.encoder = encoder
        other.store = EmbeddingStore(encoder, None, tokens=self.store.tokens)
        return other

    def prepare(self, texts: list[str], told: Callable[[int], None] = lambda _: None) -> Prepared:
        """Encode texts that are asked about under many conditions, and keep what the head reads of them.

        Args:
            texts: at least one.
            told: called with the number of texts done, now and then; what it raises ends the work.

        Raises:
            DataError: no texts, or an unusable one.
        """
        if not texts:
            raise DataError("no texts to encode; give at least one")
        clean = [normalise_text(text, f"text {row}") for row, text in enumerate(texts)]
        for start in range(0, len(clean), _TOLD):
            self.store.prepare(clean[start : start + _TOLD])
            told(min(start + _TOLD, len(clean)))
        # Texts of like length stand together: little of a block is padding.
        lengths = torch.tensor([len(text) for text in clean])
        order = lengths.argsort(stable=True) if self.store.tokens else torch.arange(len(clean))
        return Prepared(self.store.embed(clean).to(self.device), list(self._blocks(clean, order)))

    def prepared_vectors(self, vectors: Float[Tensor, "N E"]) -> Prepared:
        """Take sentence vectors that the model's own encoder made before.

        Args:
            vectors: of norm 1, as the encoder gives them.

        Raises:
            DataError: the head reads tokens, or vectors of another width.
        """
        settings, width = self.head.settings, self.head.width
        if settings.pooling != "sentence":
            raise DataError(
                f"model {settings.name} pools the tokens of a text anew under each condition, so vectors "
                "cannot stand for texts; leave v0, v1, ... out, or choose a model with pooling: sentence"
            )
        if vectors.shape[1] != width:
            raise DataError(f"vectors have {vectors.shape[1]} numbers, model {settings.name} reads {width}")
        return Prepared(vectors.to(self.device), [
            Block(place, Rows.of(torch.arange(len(place), device=self.device)), None, None)
            for place in torch.arange(len(vectors), device=self.device).split(_AT_ONCE)
        ])  # fmt: skip

    def _blocks(self, texts: list[str], order: Int[Tensor, " N"]) -> Iterator[Block]:
        """Read the token states of texts, some at once."""
        for place in order.split(_AT_ONCE):
            tokens = mask = None
            if self.store.tokens:
                some = [texts[row] for row in place.tolist()]
                tokens, mask = self.store.token_states(some).padded(torch.arange(len(some)))
                tokens, mask = token_scale(tokens.to(self.device)), mask.to(self.device)
            rows = Rows.of(torch.arange(len(place), device=self.device))
            yield Block(place.to(self.device), rows, tokens, mask)

    @torch.inference_mode()
    def encode(
        self, texts: list[str] | Prepared, condition: Condition, strength: float = 1.0
    ) -> Float[Tensor, "N D"]:
        """Embed texts under one condition.

        Args:
            texts: at least one; prepared ones are quicker.
            condition: what to look at; several with weights interpolate, a negative weight subtracts.
            strength: 0 gives the plain encoder, 1 the trained model, in between a blend of the two unit
                vectors; up to 2 it goes on beyond the model.

        Returns:
            Unit-norm embeddings.

        Raises:
            DataError: no texts, an unusable text or condition, or a strength outside 0..2.
        """
        return self._encode(texts, [condition], [0] * len(texts), strength)

    def encode_conditioned(
        self, texts: list[str] | Prepared, conditions: list[Condition], strength: float = 1.0
    ) -> Float[Tensor, "N D"]:
        """Embed each text under its own condition; every distinct condition's weights are generated once.

        Raises:
            DataError: as :meth:`encode`, or as many conditions as texts were not given.
        """
        if len(texts) != len(conditions):
            raise DataError(f"{len(texts)} texts need as many conditions, got {len(conditions)}")
        keys = [item if isinstance(item, str) else tuple(sorted(item.items())) for item in conditions]
        unique = dict(zip(keys, conditions, strict=True))
        place = {key: row for row, key in enumerate(unique)}
        return self._encode(texts, list(unique.values()), [place[key] for key in keys], strength)

    @torch.inference_mode()
    def _encode(
        self, texts: list[str] | Prepared, conditions: list[Condition], which: list[int], strength: float
    ) -> Float[Tensor, "N D"]:
        """Embed text n under condition ``which[n]``."""
        if not len(texts):
            raise DataError("no texts to encode; give at least one")
        if not 0 <= strength <= 2:
            raise DataError(
                f"strength must lie in 0..2 (0: plain encoder, 1: the trained model), got {strength}"
            )
        if not isinstance(texts, Prepared):
            clean = [normalise_text(text, f"text {row}") for row, text in enumerate(texts)]
            plain = self.store.embed(clean).to(self.device)
            texts = Prepared(plain, self._blocks(clean, torch.arange(len(clean))))
        if texts.plain.device.type != self.device.type:
            raise DataError(
                f"these texts were prepared before the model moved to {self.device}; prepare them again"
            )
        unit = functional.normalize(texts.plain, dim=-1)
        if strength == 0:
            return unit.cpu()
        features, mapped = self.condition_features(conditions).to(self.device), torch.empty_like(unit)
        chosen, weights = torch.tensor(which, device=self.device), None
        if len(conditions) == 1 and self.head.generator is not None:
            weights = self.head.generator(features)  # once, for all blocks
        for block in texts.blocks:
            asked = Rows.of(chosen[block.place])
            sentences = self.scaled(texts.plain[block.place])[block.rows.unique]
            batch = Batch(sentences, block.tokens, block.mask, block.rows, features[asked.unique], asked)
            mapped[block.place] = functional.normalize(self.head(batch, weights), dim=-1)
        return functional.normalize((1 - strength) * unit + strength * mapped, dim=-1).cpu()

    def similarity(
        self, first: list[str], second: list[str], condition: Condition, strength: float = 1.0
    ) -> Float[Tensor, "N M"]:
        """Cosine of every first text with every second one under a condition; -1 to 1."""
        return self.encode(first, condition, strength) @ self.encode(second, condition, strength).T


def _head_of(about: dict[str, Any], path: Path, prefix: str = "") -> ConditionedHead:
    """Build a head as its card describes it and fill in its weights."""
    head = ConditionedHead(ModelSettings(**about["settings"]), about["width"], about["condition_width"])
    fill_in(head, path, prefix)
    return head.eval()


def _unit_of(about: dict[str, Any]) -> bool:
    """Return whether a head expects unit variance; heads kept before there was a choice do.

    Raises:
        ValueError: it is neither true nor false.
    """
    unit = about.get("unit", True)
    if not isinstance(unit, bool):
        raise ValueError(f"unit must be true or false, got {unit!r}")
    return unit
