"""Trained connectors of a zoo, to ask: map texts into an image encoder's space and compare.

Shape letters: N texts, M images, X text width, Z image width.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from workbench.encoders import check_finite
from workbench.errors import DataError, RunError
from workbench.geometry.closed_form import LinearMap
from workbench.papers.comparison import keep_tensors

Pair = tuple[str, str]  # text encoder, image encoder


@dataclass(frozen=True)
class ConnectorZoo:
    """The linear connectors that one way found, by pair.

    Attributes:
        maps: from (text encoder, image encoder) to the connector.
        model: name of the way.
    """

    maps: dict[Pair, LinearMap]
    model: str

    @classmethod
    def load(cls, folder: Path) -> "ConnectorZoo":
        """Load what a run kept.

        Raises:
            RunError: the files are missing or damaged, or hold NaN or infinity.
        """
        try:
            about = json.loads((folder / "head.json").read_text("utf-8"))
            tensors = load_file(folder / "head.safetensors")
            names = sorted({key.rpartition(".")[0] for key in tensors})
            maps = {
                tuple(name.split("|")): LinearMap(tensors[f"{name}.weight"], tensors[f"{name}.bias"])
                for name in names
            }
            if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
                raise ValueError("the weights hold NaN or infinity")
            return cls(maps, about["model"])
        except Exception as problem:  # json, safetensors and the file system each have their own
            reason = " ".join(str(problem).split())[:300]
            raise RunError(
                f"{folder} holds no usable connectors: {reason}. Run the recipe again"
            ) from problem

    def keep(self, folder: Path, about: dict[str, Any]) -> None:
        """Keep the connectors beside a description, as :meth:`load` reads them."""
        named = {"|".join(pair): one for pair, one in self.maps.items()}
        weights = {f"{name}.weight": one.weight for name, one in named.items()}
        keep_tensors(folder, weights | {f"{name}.bias": one.bias for name, one in named.items()}, about)

    def pairs(self) -> list[Pair]:
        """Return every (text encoder, image encoder) that there is a connector for."""
        return list(self.maps)

    def connector(self, text: str, image: str) -> LinearMap:
        """Return one connector.

        Raises:
            DataError: no such pair.
        """
        if (text, image) not in self.maps:
            known = "; ".join(f"{one} -> {two}" for one, two in self.maps)
            raise DataError(f"no connector {text} -> {image}; there are: {known}")
        return self.maps[text, image]

    def similarity(
        self, texts: Float[Tensor, "N X"], images: Float[Tensor, "M Z"], text: str, image: str
    ) -> Float[Tensor, "N M"]:
        """Return the cosine of every text, mapped, with every image; -1 to 1.

        Args:
            texts: embeddings by the text encoder, any norm.
            images: features by the image encoder, any norm.
            text: name of the text encoder.
            image: name of the image encoder.

        Raises:
            DataError: no such pair, a row without a cosine, or embeddings of another width.
        """
        connector = self.connector(text, image)
        for given, width, what in (
            (texts, connector.weight.shape[0], text),
            (images, len(connector.bias), image),
        ):
            check_finite(given, what)
            if given.shape[1] != width:
                raise DataError(f"{what} has width {width}, got embeddings of width {given.shape[1]}")
        mapped = connector(functional.normalize(texts, dim=1))
        return functional.normalize(mapped, dim=1) @ functional.normalize(images, dim=1).T
