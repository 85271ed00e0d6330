"""Class names in, a classifier out: a trained HyperCLIP model and the small encoders it adapts.

Shape letters: N images, S side in pixels, C classes, D joint width, P generated numbers.
"""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError
from torch import Tensor

from workbench.conditions import normalise_text
from workbench.datasets.class_sets import PLAIN_TEMPLATES, check_classes
from workbench.encoders import TextEncoder
from workbench.errors import DataError, RunError
from workbench.evaluation.zero_shot import class_ranks
from workbench.hypernetworks import GeneratedWeights
from workbench.manifests import cache_folder
from workbench.papers.comparison import fill_in
from workbench.papers.hyper_clip import HyperCLIP, build_clip
from workbench.papers.hyper_clip_settings import ClipModelSettings, ImageTower, TextTower
from workbench.store import EmbeddingStore

AT_ONCE = 256  # images embedded together


class HyperCLIPModel:
    """A trained model that turns class names into classifiers.

    One image tower serves them all; a lock keeps threads from adapting it under each other's hands. Pictures
    go in and answers come out on the CPU, wherever it computes; embeddings and weights stay where it does.
    """

    def __init__(
        self,
        model: HyperCLIP,
        size: int,
        store: EmbeddingStore | None,
        context: int = 77,
    ) -> None:
        """Put a trained model and its text inputs together.

        Args:
            model: in evaluation mode.
            size: side S of its images.
            store: of the frozen sentence encoder; None if the text tower reads tokens.
            context: tokens a text is cut at, for a text tower that reads tokens.
        """
        self.model, self.size, self.store, self.context = model.eval(), size, store, context
        self.lock = threading.RLock()

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "HyperCLIPModel":
        """Open a model that a run kept; only safetensors and JSON are read.

        Raises:
            RunError: the folder holds no such model, or weights that do not fit the tower.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / "head.json").read_text("utf-8"))
            image, text = ImageTower(**about["image"]), TextTower(**about["text"])
            clip = build_clip(image, text, about["embed_dim"], 0.0, about["text_width"])
            model = HyperCLIP(ClipModelSettings(**about["settings"]), clip, about["embed_dim"])
            if about["calibration"]:
                shape = about["calibration"], 3, image.image_size, image.image_size
                model.calibration = torch.empty(shape, dtype=torch.uint8)
            fill_in(model, folder / "head.safetensors")
            encoder = about["encoder"]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as problem:
            reason = " ".join(str(problem).split())[:300]
            raise RunError(
                f"{folder} holds no usable image-text model: {reason}. Train it again"
            ) from problem
        store = None
        if text.kind == "sentences":
            store = EmbeddingStore(TextEncoder(encoder, device), cache_folder())
        return cls(model.to(device), image.image_size, store, text.context)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.clip.logit_scale.device

    def to(self, device: torch.device | str) -> "HyperCLIPModel":
        """Compute on a device from now on; classifiers made before must be made again.

        Args:
            device: as torch names devices.
        """
        with self.lock:
            self.model.to(device)
            if self.store is not None:
                self.store.to(device)
        return self

    @property
    def blends(self) -> bool:
        """Whether strength goes from an encoder without a condition to the generated one."""
        return self.model.generator is not None and not self.model.replaces

    def text_inputs(self, texts: list[str]) -> Tensor:
        """Return what the text tower reads: sentence embeddings, or tokens."""
        if self.store is not None:
            return self.store.embed(texts).to(self.device)
        from open_clip import SimpleTokenizer

        return SimpleTokenizer(context_length=self.context)(texts).to(self.device)

    @torch.inference_mode()
    def adapt(
        self, class_names: list[str], templates: Sequence[str] = PLAIN_TEMPLATES, strength: float = 1.0
    ) -> "Classifier":
        """Generate the encoder for some classes, from their names alone.

        Args:
            class_names: two or more, each once.
            templates: words around a class name; each holds one pair of braces.
            strength: 0 is the encoder without a condition, 1 the model; other than 1 only where there is such
                an encoder (:attr:`blends`).

        Raises:
            DataError: class names, templates or a strength that cannot be used.
        """
        if strength != 1 and not self.blends:
            name = self.model.settings.name
            raise DataError(f"model {name} has no encoder without its condition, so strength is 1")
        names = check_classes(class_names)
        if isinstance(templates, str) or not templates:
            raise DataError(f"templates must be a list of one or more texts, got {templates!r}")
        for place, template in enumerate(templates):
            if normalise_text(template, f"template {place}").count("{}") != 1:
                raise DataError(f"template {template!r} needs one {{}} where the class name goes")
        prompts = [template.replace("{}", name) for name in names for template in templates]
        with self.lock:  # the store, too, takes in new texts for one caller at a time
            directions = self.model.class_weights(self.text_inputs(prompts), len(names))
            weights = self.model.generate(directions)
            if strength == 0:
                weights = None
            if weights is not None:  # vectors, which are added to the tower's own
                scaled = {name: strength * tensor for name, tensor in weights.tensors.items()}
                weights = self.model.calibrate(GeneratedWeights(weights.spec, scaled))
        return Classifier(self, names, directions, weights)

    @torch.inference_mode()
    def embed(
        self, pixels: UInt8[Tensor, "N 3 S S"], weights: GeneratedWeights | None, rows: Tensor | None = None
    ) -> Float[Tensor, "N D"]:
        """Embed images under generated weights, or neutrally; ``rows`` gives each image its condition."""
        with self.lock:
            parts = []
            for start in range(0, max(len(pixels), 1), AT_ONCE):
                some = slice(start, start + AT_ONCE)
                self.model.use(weights, None if rows is None else rows[some].to(self.device))
                parts.append(self.model.embed_images(pixels[some].to(self.device)))
            self.model.use(None)
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_tasks(
        self, pixels: UInt8[Tensor, "N 3 S S"], tasks: list["Classifier"], rows: Tensor
    ) -> Float[Tensor, "N D"]:
        """Embed images of different tasks in one pass: convolutions are shared, each has its own norms.

        Args:
            pixels: of all tasks.
            tasks: classifiers of this model.
            rows: which task each image belongs to.
        """
        weights = tasks[0].weights
        if weights is not None:
            each = [task.weights.tensors for task in tasks]
            tensors = {name: torch.cat([own[name] for own in each]) for name in weights.tensors}
            weights = GeneratedWeights(weights.spec, tensors)
        return self.embed(pixels, weights, rows)


@dataclass(frozen=True)
class Classifier:
    """An image classifier for one class set.

    Attributes:
        source: the model it was generated by.
        classes: names, in the order of the scores.
        directions: one unit vector per class.
        weights: generated for these classes; None for a model that generates none.
    """

    source: HyperCLIPModel
    classes: list[str]
    directions: Float[Tensor, "C D"]
    weights: GeneratedWeights | None

    @torch.inference_mode()
    def scores(self, pixels: Tensor) -> Float[Tensor, "N C"]:
        """Return logits t <x, y_c> + b of uint8 images ``[N, 3, S, S]``, on the CPU; higher is better.

        Raises:
            DataError: images of another shape, or the model has moved to another device since.
        """
        size = self.source.size
        if self.directions.device.type != self.source.device.type:
            raise DataError(
                f"this classifier was made before the model moved to {self.source.device}; adapt again"
            )
        shape = len(pixels), 3, size, size
        if not isinstance(pixels, Tensor) or tuple(pixels.shape) != shape or pixels.dtype != torch.uint8:
            raise DataError(
                f"images are {pixels.dtype} of shape {tuple(pixels.shape)}; give uint8 (N, 3, {size}, {size})"
            )
        images = self.source.embed(pixels, self.weights)
        scale, bias = self.source.model.scale_and_bias()
        return (scale * images @ self.directions.T + bias).cpu()

    def classify(self, pixels: Tensor) -> pl.DataFrame:
        """Return the best class of every image and its share of the softmax over the classes, 0 to 1."""
        share = self.scores(pixels).softmax(-1)
        best = share.max(-1)
        return pl.DataFrame(
            {"class": [self.classes[place] for place in best.indices.tolist()], "share": best.values.tolist()}
        )

    @torch.inference_mode()
    def ranks(self, pixels: UInt8[Tensor, "N 3 S S"], label: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
        """Return the rank of each picture's true class among all, as a run counts it; 1 is best."""
        images = self.source.embed(pixels, self.weights)
        return class_ranks(images, self.directions, label.to(self.source.device))[0].cpu()

    def vector(self) -> Float[Tensor, " P"]:
        """Return the generated numbers end to end, in the order of the spec, on the CPU: a task pack's."""
        if self.weights is None:
            name = self.source.model.settings.name
            raise RunError(f"model {name} generates no weights; there is no task vector")
        return torch.cat([tensor[0].flatten() for tensor in self.weights.tensors.values()]).cpu()
