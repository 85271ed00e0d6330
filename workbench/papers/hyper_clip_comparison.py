"""Trains every model of a HyperCLIP recipe and asks it every class set; a killed run loses one model."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.datasets.class_sets import Captioned, ClassSet, Questions
from workbench.datasets.photos import load_photos
from workbench.datasets.scenes import SceneData, load_scenes
from workbench.datasets.shards import ShardData, Tokens, load_shards
from workbench.evaluation.fairness import by_group
from workbench.evaluation.ranking import resample
from workbench.evaluation.similarity import Measured
from workbench.evaluation.zero_shot import accuracy_values, class_ranks, per_class_weights
from workbench.files import digest
from workbench.geometry.uniformity import placement, spaced
from workbench.hypernetworks import GeneratedWeights, health_of
from workbench.hypernetworks.generators import standardise
from workbench.papers.comparison import (
    METRIC_COLUMNS,
    Clock,
    Comparison,
    Found,
    Loaded,
    card_of,
    finished_or,
    keep_head,
    metric_rows,
    run_models,
    training_folder,
)
from workbench.papers.hyper_clip import ClipLoss, HyperCLIP, build_clip
from workbench.papers.hyper_clip_settings import UNTRAINED, ClipModelSettings, HyperCLIPRecipe
from workbench.processes import leads
from workbench.store import EmbeddingStore
from workbench.training import fit, seed_everything

RECIPE = HyperCLIPRecipe
AT_ONCE = 256  # images embedded together
Content = tuple[Captioned, dict[str, Questions]]


def needs_tokens(recipe: HyperCLIPRecipe) -> bool:
    """A frozen sentence encoder gives one vector a text."""
    return False


def load_data(recipe: HyperCLIPRecipe) -> Loaded:
    """Draw or read the recipe's images, captions and class sets."""
    load = {SceneData: load_scenes, ShardData: load_shards}.get(type(recipe.data), load_photos)
    train, questions = load(recipe.data)
    counts = {"train": {"images": len(train), "captions": len(train.texts)}}
    raw = train.fingerprint()
    for split, asked in questions.items():
        counts[split] = {"images": len(asked.pixels), "class_sets": len(asked.sets)}
        raw += [asked.pixels.numpy().tobytes(), *(text for one in asked.sets for text in one.prompts())]
        raw += [one.label.numpy().tobytes() for one in asked.sets]
    return Loaded((train, questions), digest(*raw), counts)


def compare(
    recipe: HyperCLIPRecipe, content: Content, store: EmbeddingStore, workspace: Path, device: str
) -> Comparison:
    """Run a recipe.

    Args:
        recipe: settings.
        content: images with captions, and the questions by split.
        store: embeds texts, if the text tower stands on a frozen encoder.
        workspace: private folder; finished models in its folder training are reused, kept models go to its
            folder models.
        device: as torch names devices.

    Raises:
        RunError: a training diverged, or the disk is full; finished models stay in the workspace.
    """
    train, questions = content
    inputs = text_inputs(recipe, store)
    if recipe.text.kind == "sentences":
        asked = [text for split in questions.values() for one in split.sets for text in one.prompts()]
        store.prepare([*train.texts, *asked])

    def guess(_: str) -> dict[str, Tensor]:
        return {
            f"{split}|{one.name}": torch.zeros(2, len(one.rows), dtype=torch.long)  # rank 0: a guess
            for split, found in questions.items()
            for one in found.sets
        }

    def train_one(model: ClipModelSettings, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        job = _Job(recipe, model, seed, content, inputs, workspace, device)
        return finished_or(training_folder(workspace, model.name, seed), job.train)

    found = run_models(recipe, UNTRAINED, guess, train_one)
    return Comparison(
        _metrics(recipe, questions, found), _scores(questions, found), [one.card for one in found]
    )


def text_inputs(recipe: HyperCLIPRecipe, store: EmbeddingStore) -> Callable[[list[str]], Tensor]:
    """Return what turns texts into the text tower's inputs: sentence embeddings, or open_clip's tokens."""
    if recipe.text.kind == "sentences":
        return store.embed
    from open_clip import SimpleTokenizer

    return SimpleTokenizer(context_length=recipe.text.context)


def build_model(recipe: HyperCLIPRecipe, model: ClipModelSettings, text_width: int) -> HyperCLIP:
    """Build one model of a recipe, untrained."""
    bias = recipe.logit_bias
    if bias is None:  # log odds of a match: one of the texts of a batch is true of an image
        bias = -float(np.log(max(recipe.training.batch_size - 1, 1)))
    clip = build_clip(recipe.image, recipe.text, recipe.embed_dim, bias, text_width)
    return HyperCLIP(model, clip, recipe.embed_dim)


@dataclass(frozen=True)
class _Job:
    """One model under one seed."""

    recipe: HyperCLIPRecipe
    model: ClipModelSettings
    seed: int
    content: Content
    inputs: Callable[[list[str]], Tensor]
    workspace: Path
    device: str

    def train(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Train and ask; results are the rank of the true class and the predicted class by split and set."""
        recipe, settings = self.recipe, self.model
        data, questions = self.content
        seed_everything(self.seed)
        clock = Clock(self.device)
        lazy = isinstance(recipe.data, ShardData)
        texts = (Tokens(data.texts, self.inputs) if lazy else self.inputs(data.texts)).to(self.device)
        width = texts[torch.arange(1)].shape[-1]
        model = build_model(recipe, settings, width).to(self.device)
        generator = model.generator
        start = generator.head.weight.detach().clone() if generator is not None else None
        data = data.to(self.device)
        model.centre(data.pixels[:AT_ONCE], texts[torch.randperm(len(texts))[:AT_ONCE]])
        kinds, classes = settings.kinds_at_once or recipe.kinds_at_once, settings.classes_at_once
        classes = recipe.classes_at_once if classes is None else classes
        loss = ClipLoss(model, data, texts, kinds, recipe.half, recipe.captions_at_once, classes)
        training = recipe.training.at_rate(settings.learning_rate)
        history = fit(
            model,
            loss,
            loss.count,
            training,
            folder,
            seed=self.seed,
            rates={"generator.": settings.generator_rate},
        )
        cost = clock.stop()
        cost["images_per_second"] = round(loss.count * training.epochs / max(cost["seconds"], 1e-9), 1)
        model.use(None)
        if generator is not None and settings.calibration:
            model.calibration = data.pixels[: settings.calibration].clone()
        results = {}
        for split, asked in questions.items():
            results |= {f"{split}|{name}": found for name, found in self._ask(model, asked, split).items()}
        card = card_of(settings, self.seed, model, cost, history)
        card["geometry"] = {"split": "test", **self._placement(model, questions["test"])}
        if start is not None:
            sets = [
                self._directions(model, one)[:8] for one in questions["test"].sets if len(one.classes) >= 4
            ]
            least = min(len(one) for one in sets)
            members = standardise(torch.stack([one[:least] for one in sets]))  # as the model feeds them
            card["health"] = health_of(generator, members, start).to_dict()
            card["cost"] = generator.cost()
        if settings.keep_weights and self.seed == recipe.seeds[0] and leads():
            about = {"settings": settings.model_dump(mode="json"), "text_width": width}
            about["calibration"] = len(model.calibration)
            shared = {"image", "text", "embed_dim", "encoder"}
            about |= recipe.model_dump(mode="json", include=shared)
            keep_head(self.workspace / "models" / settings.name, model, about)
        return results, card

    @torch.inference_mode()
    def _directions(self, model: HyperCLIP, one: ClassSet) -> Float[Tensor, "C D"]:
        """Return a unit direction per class."""
        return model.class_weights(self.inputs(one.prompts()).to(self.device), len(one.classes))

    @torch.inference_mode()
    def _placement(self, model: HyperCLIP, asked: Questions) -> dict[str, float | int | None]:
        """Say how near images and their class names lie, and how evenly images do, on the first class set."""
        one = next(one for one in asked.sets if not one.side)
        some, weights = spaced(len(one.rows)), self._directions(model, one)
        if model.generator is not None:
            model.use(model.calibrate(model.generate(weights)))
        images = embed(model, asked.pixels[one.rows[some]].to(self.device))
        return placement(images, weights[one.label[some].to(self.device)], images)

    @torch.inference_mode()
    def _ask(self, model: HyperCLIP, asked: Questions, split: str) -> dict[str, Int[Tensor, "2 N"]]:
        """Ask every class set; a generator also with another set's weights and without calibration."""
        pixels, found = asked.pixels.to(self.device), {}
        directions = {one.name: self._directions(model, one) for one in asked.sets}
        generated = self._generated(model, asked, directions)
        # Without a generator, or told nothing, a model embeds an image alike for every set.
        alike = not generated or model.generator.tokens is not None
        kept: dict[str, Tensor] = {}
        for place, one in enumerate(asked.sets):
            weights, label, rows = directions[one.name], one.label.to(self.device), one.rows.to(self.device)
            asking: dict[str, GeneratedWeights | None] = {"": None}
            if generated:
                plain, calibrated = generated[one.name]
                asking[""] = calibrated
                if split == "test" and not one.side:
                    other = next(two for two in (asked.sets * 2)[place + 1 :] if not two.side)
                    asking["|weights of another set"] = generated[other.name][1]
                    if calibrated is not plain:
                        asking["|running statistics"] = plain
                    if not model.replaces:
                        asking["|neutral"] = None
            for side, used in asking.items():
                if side not in kept:
                    model.use(used)
                    kept[side] = embed(model, pixels if alike else pixels[rows])
                ranks = class_ranks(kept[side][rows] if alike else kept.pop(side), weights, label)
                found[f"{one.name}{side}"] = torch.stack(ranks).cpu()
        return found

    def _generated(
        self, model: HyperCLIP, asked: Questions, directions: dict[str, Tensor]
    ) -> dict[str, tuple[GeneratedWeights, GeneratedWeights]]:
        """Generate each class set's weights once, as they are and calibrated; none without a generator."""
        found: dict[str, tuple[GeneratedWeights, GeneratedWeights]] = {}
        for one in asked.sets if model.generator is not None else ():
            told = directions[one.name]
            if found and model.generator.tokens is not None:  # told nothing, so the same for every set
                found[one.name] = next(iter(found.values()))
                continue
            if one.distractors:
                besides = model.embed_texts(self.inputs(list(one.distractors)).to(self.device))
                told = torch.cat([told, besides])
            made = model.generate(told)
            found[one.name] = made, model.calibrate(made)
        return found


@torch.inference_mode()
def embed(model: HyperCLIP, pixels: Tensor) -> Float[Tensor, "N D"]:
    """Embed images in blocks."""
    return torch.cat([model.embed_images(part) for part in pixels.split(AT_ONCE)])


@dataclass(frozen=True)
class _Asked:
    """A split's questions end to end: which image, which class, and the answers of all models."""

    image: np.ndarray
    label: np.ndarray
    classes: np.ndarray
    rank: np.ndarray  # [S, Q]
    sets: int


def _gather(sets: list[ClassSet], found: list[Found], split: str, side: str = "") -> _Asked:
    """Lay class sets end to end."""
    ranks = [
        np.concatenate([one.results[f"{split}|{asked.name}{side}"][0].numpy() for asked in sets])
        for one in found
    ]
    sizes = [len(one.rows) for one in sets]
    return _Asked(
        np.concatenate([one.rows.numpy() for one in sets]),
        np.concatenate([one.label.numpy() for one in sets]),
        np.repeat([len(one.classes) for one in sets], sizes),
        np.stack(ranks),
        len(sets),
    )


class _Rows:
    """Metric rows in the making: every row says its split, group and count."""

    def __init__(self, recipe: HyperCLIPRecipe) -> None:
        self.recipe, self.rows = recipe, []
        self.against = {model.name: model.against for model in recipe.models}

    def add(
        self, split: str, group: str, metric: str, measured: Measured, items: list[Found], count: int
    ) -> None:
        place = {"split": split, "group": group, "count": count}
        found = metric_rows(metric, measured, items, self.against, self.recipe.reference)
        self.rows += [{**place, **row} for row in found]

    def add_questions(
        self, split: str, group: str, asked: _Asked, items: list[Found], only: tuple[str, ...] = ()
    ) -> None:
        for metric, values in _values(asked).items():
            if not only or metric in only:
                drawn = resample(values, asked.image, self.recipe.resamples)
                measured = Measured(values.mean(1), drawn)
                self.add(split, group, metric, measured, items, len(np.unique(asked.image)))


def _metrics(recipe: HyperCLIPRecipe, questions: dict[str, Questions], found: list[Found]) -> pl.DataFrame:
    """Measure all models: all questions, families, class sets, groups of images, and the side reports."""
    rows = _Rows(recipe)
    for split, asked in questions.items():
        main = [one for one in asked.sets if not one.side]
        named = {"all": main}
        named |= {f"family={name}": [one for one in asked.sets if one.family == name]
                  for name in dict.fromkeys(one.family for one in asked.sets) if name}  # fmt: skip
        named |= {f"set={one.name}": [one] for one in asked.sets}
        for group, sets in named.items():
            rows.add_questions(split, group, _gather(sets, found, split), found)
        _add_groups(rows, asked, _gather(main, found, split), found, split)
        # Sorted: results that are read back from a file come in another order.
        sides = sorted({key.split("|")[2] for one in found for key in one.results if key.count("|") == 2})
        for side in sides:
            items = [one for one in found if f"{split}|{main[0].name}|{side}" in one.results]
            for name, sets in named.items() if items else ():
                if name == "all" or (name.startswith("family") and not sets[0].side):
                    group = (
                        f"side={side}" if name == "all" else f"side={side}, {name.removeprefix('family=')}"
                    )
                    rows.add_questions(
                        split, group, _gather(sets, items, split, f"|{side}"), items, ("top1",)
                    )
    same = {"paper": recipe.paper, "recipe": recipe.name, "dataset": recipe.data.name}
    return pl.DataFrame([{**same, **row} for row in rows.rows], schema=METRIC_COLUMNS)


def _add_groups(rows: _Rows, asked: Questions, gathered: _Asked, found: list[Found], split: str) -> None:
    """Break top-1 down by every fair column: each group, the worst that is large enough, and the gap."""
    recipe = rows.recipe
    values = {name: one for name, one in _values(gathered).items() if name != "mean_per_class"}
    for column, (metric, correct) in product(asked.fair, values.items()):
        names = [asked.about[column][int(row)] for row in gathered.image]
        parts = by_group(correct, names, gathered.image, recipe.smallest_group, recipe.resamples)
        for name, count, measured in zip(parts.groups, parts.counts, parts.measured, strict=True):
            rows.add(split, f"{column}={name}", metric, measured, found, count)
        judged = [size for size, fine in zip(parts.counts, parts.judged, strict=True) if fine]
        for kind, measured in (("worst_group", parts.worst), ("gap", parts.gap)):
            if measured is not None:
                rows.add(split, f"by={column}", f"{kind}_{metric}", measured, found, min(judged))


def _values(asked: _Asked) -> dict[str, np.ndarray]:
    """Return what each question adds to each metric; the mean over classes only within one class set."""
    values = accuracy_values(asked.rank, asked.classes)
    if asked.classes.min() < 10:
        del values["top5"]
    if asked.sets == 1:
        values["mean_per_class"] = values["top1"] * per_class_weights(asked.label)
    return values


def _scores(questions: dict[str, Questions], found: list[Found]) -> pl.DataFrame:
    """Lay all answers out as one table: images by their row numbers, with their groups; no text."""
    parts = []
    for split, asked in questions.items():
        groups = asked.about.select(asked.fair).with_row_index("image")
        for one in asked.sets:
            for item in found:
                if item.seed is None:
                    continue
                rank, predicted = item.results[f"{split}|{one.name}"].numpy()
                frame = pl.DataFrame(
                    {"split": split, "set": one.name, "image": one.rows.numpy().astype(np.uint32),
                     "model": item.model, "seed": item.seed, "label": one.label.numpy(),
                     "predicted": predicted, "rank": rank}
                )  # fmt: skip
                parts.append(frame.join(groups, on="image", how="left", maintain_order="left"))
    return pl.concat(parts, how="diagonal")  # splits may be broken down by different groups
