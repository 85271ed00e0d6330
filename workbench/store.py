"""The embedding store: each unique text is encoded once per encoder, ever; on pages, once per server.

A folder per encoder fingerprint holds shards of up to 512 texts. A shard's name is the hash of its content,
so a damaged one is noticed, dropped and computed again; it is written whole and renamed, so a killed process
leaves only finished shards, and the next one computes what is missing.
"""

import copy
import hashlib
import logging
import threading
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load, save
from torch import Tensor
from tqdm.auto import tqdm

from workbench.encoders import TextEncoder, TokenStates, check_finite
from workbench.files import digest, write_atomic

SHARD = 512
# A tokenizer cannot serve two threads, and two that add at once would mix up shards; one pass uses all cores.
_ENCODING = threading.Lock()
_log = logging.getLogger(__name__)


class EmbeddingStore:
    """Sentence vectors, and token states if asked for, of every text seen, on disk and in memory."""

    def __init__(self, encoder: TextEncoder, folder: Path | None, tokens: bool = False) -> None:
        """Open a store; what was encoded before is found by its text, the weights and the settings.

        Args:
            encoder: computes what is missing.
            folder: the cache; the store makes its own folder in it. None keeps everything in memory only.
            tokens: also keep the token states (half precision, about 0.75 kB a token at width 384).
        """
        self.encoder, self.tokens = encoder, tokens
        kind = "tokens" if tokens else "sentences"
        self._place: dict[str, tuple[int, int]] = {}  # key of a text -> shard, row
        self._shards: list[dict[str, Tensor]] = []
        self.folder = folder and folder / "embeddings" / digest(encoder.fingerprint, kind)[:32]
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            self._open(path)

    def apart(self) -> "EmbeddingStore":
        """Return a store that knows what this one does, and keeps what it learns in memory only."""
        other = copy.copy(self)
        other.folder, other._place, other._shards = None, dict(self._place), list(self._shards)
        return other

    def to(self, device: torch.device | str) -> "EmbeddingStore":
        """Encode on a device from now on; what is kept stays on the CPU."""
        self.encoder.model.to(device)
        return self

    def _open(self, path: Path) -> None:
        """Read one shard, or drop it if its content is not what its name says."""
        raw = path.read_bytes()
        if hashlib.sha256(raw).hexdigest()[:32] != path.stem:
            _log.warning("embedding shard %s is damaged; its texts are encoded again", path.name)
            path.unlink(missing_ok=True)
            return
        self._add(load(raw))

    def _add(self, shard: dict[str, Tensor]) -> None:
        number = len(self._shards)
        self._shards.append(shard)  # before its texts can be found by another thread
        for row, key in enumerate(shard["keys"].numpy()):
            self._place.setdefault(key.tobytes().hex(), (number, row))

    def prepare(self, texts: list[str]) -> int:
        """Encode the texts that the store does not hold yet.

        Returns:
            How many texts were encoded now.
        """
        if all(digest(text) in self._place for text in texts):
            return 0
        with _ENCODING:
            return self._encode({text for text in texts if digest(text) not in self._place})

    def _encode(self, texts: set[str]) -> int:
        """Encode texts shard by shard, short ones first."""
        missing = sorted(texts, key=lambda text: (len(text), text))
        self.encoder.warn_if_truncated(missing)
        quick = len(missing) < 100  # well under two seconds
        with tqdm(total=len(missing), desc="encoding texts", unit="text", leave=False, disable=quick) as bar:
            for start in range(0, len(missing), SHARD):
                part = missing[start : start + SHARD]
                self._write(part)
                bar.update(len(part))
        return len(missing)

    def _write(self, texts: list[str]) -> None:
        """Encode and publish one shard."""
        keys = torch.tensor([list(bytes.fromhex(digest(text))) for text in texts], dtype=torch.uint8)
        shard = {"keys": keys}
        if self.tokens:
            shard["sentences"], states = self.encoder.encode_with_tokens(texts)
            shard["states"] = torch.cat(states)
            lengths = torch.tensor([0, *(len(state) for state in states)])
            shard["offsets"] = lengths.cumsum(0)
        else:
            shard["sentences"] = self.encoder.encode(texts)
        check_finite(shard["sentences"], f"embedding by {self.encoder.name}")
        if self.folder is not None:
            raw = save(shard)
            write_atomic(self.folder / f"{hashlib.sha256(raw).hexdigest()[:32]}.safetensors", raw)
        self._add(shard)

    def _places(self, texts: list[str]) -> list[tuple[int, int]]:
        self.prepare(texts)
        return [self._place[digest(text)] for text in texts]

    def embed(self, texts: list[str]) -> Float[Tensor, "N D"]:
        """Return sentence vectors of norm 1, in the order of the texts."""
        return torch.stack([self._shards[shard]["sentences"][row] for shard, row in self._places(texts)])

    def token_states(self, texts: list[str]) -> TokenStates:
        """Return the token states of texts, in their order.

        Raises:
            ValueError: the store was opened without ``tokens=True``.
        """
        if not self.tokens:
            raise ValueError("this store keeps no token states; open it with tokens=True")
        parts = []
        for shard, row in self._places(texts):
            offsets: Int[Tensor, " M"] = self._shards[shard]["offsets"]
            parts.append(self._shards[shard]["states"][offsets[row] : offsets[row + 1]])
        lengths = torch.tensor([0, *(len(part) for part in parts)])
        return TokenStates(torch.cat(parts), lengths.cumsum(0))
