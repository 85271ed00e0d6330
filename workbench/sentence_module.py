"""A trained head as a module of an ordinary SentenceTransformer: ``encode(texts, condition="The colour.")``.

The condition is embedded by the same model's own modules, its weights are generated once per condition, and
without a condition the plain encoder answers. One call takes one condition, because ``encode`` sorts texts
and not what belongs to them; mixed conditions go through :meth:`workbench.model.HyperCL.encode_conditioned`.
"""

import weakref
from collections.abc import MutableMapping
from typing import Any

import torch
from sentence_transformers.base.modules import Module
from torch import Tensor
from torch.nn import functional

from workbench.conditions import normalise_condition
from workbench.errors import DataError
from workbench.hypernetworks import Rows
from workbench.hypernetworks.generators import standardise, token_scale
from workbench.papers.hyper_cl import Batch, ConditionedHead
from workbench.papers.hyper_cl_settings import ModelSettings


class ConditionedModule(Module):
    """Conditioned embedding of a batch of texts; stands last in a SentenceTransformer."""

    forward_kwargs = {"condition"}  # noqa: RUF012
    config_keys = ["settings", "width", "condition_width", "unit"]  # noqa: RUF012
    config_file_name = "head.json"

    def __init__(
        self, settings: dict[str, Any], width: int, condition_width: int, unit: bool, head: Any = None
    ) -> None:
        """Build the module.

        Args:
            settings: of the head, a :class:`workbench.papers.hyper_cl.ModelSettings` as JSON types.
            width: D.
            condition_width: C.
            unit: whether the head expects embeddings brought to unit variance.
            head: a trained head; a new one if not given.
        """
        super().__init__()
        self.settings, self.width, self.condition_width, self.unit = settings, width, condition_width, unit
        self.head = head or ConditionedHead(ModelSettings(**settings), width, condition_width)
        self._model: Any = None

    def on_model_ready(self, model: Any) -> None:
        """Remember the model this module is part of, to embed conditions with it."""
        self._model = weakref.ref(model)

    def forward(
        self, features: MutableMapping[str, Any], condition: Any = None, **_: Any
    ) -> MutableMapping[str, Any]:
        """Replace the plain sentence embeddings by conditioned ones of unit norm.

        Raises:
            DataError: the condition is not one text, or shows nothing.
        """
        if condition is None:
            return features
        if not isinstance(condition, str):
            raise DataError(
                "encode takes one condition for all its texts, because it sorts the texts; use "
                "HyperCL.encode_conditioned(texts, conditions) for one condition per text"
            )
        asked = self._model().encode(normalise_condition(condition), convert_to_tensor=True)[None]
        sentences: Tensor = features["sentence_embedding"]
        rows = Rows.of(torch.arange(len(sentences), device=sentences.device))
        tokens = mask = None
        if self.head.settings.pooling != "sentence":
            mask = features["attention_mask"].bool()[rows.unique]
            tokens = token_scale(features["token_embeddings"][rows.unique] * mask[..., None])
        scale = standardise if self.unit else (lambda embedded: embedded)
        one = Rows.of(torch.zeros(len(sentences), dtype=torch.long, device=sentences.device))
        batch = Batch(scale(sentences)[rows.unique], tokens, mask, rows, scale(asked), one)
        features["sentence_embedding"] = functional.normalize(self.head(batch), dim=-1)
        return features

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write head.json and safetensors weights."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=True)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> "ConditionedModule":
        """Read what :meth:`save` wrote; nothing but safetensors is read.

        Raises:
            DataError: there are no safetensors weights.
        """
        place = {"subfolder": subfolder} | {
            key: kwargs[key]
            for key in ("token", "cache_folder", "revision", "local_files_only")
            if key in kwargs
        }
        if cls.load_file_path(model_name_or_path, "model.safetensors", **place) is None:
            raise DataError(
                f"{model_name_or_path}/{subfolder} holds no model.safetensors; pickles are not read"
            )
        module = cls(**cls.load_config(model_name_or_path, **place))
        return cls.load_torch_weights(model_name_or_path, model=module, **place)
