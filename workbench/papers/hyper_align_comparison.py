"""Connects a zoo in every way of a Hyper-Align recipe and measures every pair; a killed run loses one way.

Shape letters: N images, S ways and seeds, P pairs, R resamples.
"""

from dataclasses import dataclass
from functools import partial
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from workbench.connector_zoo import ConnectorZoo
from workbench.datasets.caption_pairs import CaptionPairs, load_pairs
from workbench.errors import DataError
from workbench.evaluation.retrieval import (
    RECALLS,
    gain_of_order,
    rank_agreement,
    recall_values,
    retrieval_ranks,
)
from workbench.evaluation.similarity import Measured
from workbench.evaluation.zero_shot import accuracy_values, class_ranks
from workbench.files import digest
from workbench.geometry.uniformity import placement, spaced
from workbench.papers.comparison import (
    METRIC_COLUMNS,
    Clock,
    Comparison,
    Found,
    Loaded,
    finished_or,
    metric_rows,
    run_models,
    training_folder,
)
from workbench.papers.hyper_align import Connected, Outcome, Pair, Task, ape, closed_form, hyper_align
from workbench.papers.hyper_align_search import both_sides, hub, linear_maps, relative_cosines, search
from workbench.papers.hyper_align_settings import CLOSED, UNTRAINED, AlignModelSettings, HyperAlignRecipe
from workbench.store import EmbeddingStore
from workbench.training import seed_everything
from workbench.zoo import Asked, Zoo, open_zoo
from workbench.zoo_files import features_from

RECIPE = HyperAlignRecipe
DIRECTIONS = ("t2i", "i2t")
VALUES = [f"{way}_recall_at_{k}" for way in DIRECTIONS for k in RECALLS]  # kept per image, in this order
MAIN = "recall_at_10"
TIE = 1e-9  # means of the same recalls, summed in another order


def needs_tokens(recipe: HyperAlignRecipe) -> bool:
    """A text encoder gives one vector a caption."""
    return False


def load_data(recipe: HyperAlignRecipe) -> Loaded:
    """Read or draw the recipe's captioned images, or open arrays of features."""
    own = recipe.data.source == "features"
    content = features_from(Path(recipe.data.path)) if own else load_pairs(recipe.data)
    counts = {split: {"images": len(rows)} for split, rows in content.splits.items()}
    about = [rows.numpy().tobytes() for rows in content.splits.values()]  # printed, long ones are cut
    if isinstance(content, Zoo):
        about += [*content.texts, "", *content.images, content.choices.numpy().tobytes()]
        about += [np.asarray(one.array).tobytes() for part in (content.texts, content.images)
                  for one in part.values()]  # fmt: skip
    else:
        about += [content.order, content.pictures.order]
        for one in content.asked:
            counts[one.classes.name] = {"images": len(one.pictures)}
            about += [one.pictures.order, *one.classes.prompts(), one.classes.label.numpy().tobytes()]
    return Loaded(content, digest(*about), counts)


def open_content(
    recipe: HyperAlignRecipe, content: CaptionPairs | Zoo, device: str, store: EmbeddingStore | None = None
) -> Zoo:
    """Extract the features of a recipe's captioned images, unless its content are features already."""
    if isinstance(content, Zoo):
        return content
    return open_zoo(recipe.zoo, content, store, device, recipe.data.size)


def compare(
    recipe: HyperAlignRecipe, content: CaptionPairs | Zoo, store: EmbeddingStore, workspace: Path, device: str
) -> Comparison:
    """Run a recipe.

    Args:
        recipe: settings.
        content: captioned images, or the features themselves.
        store: keeps the sentence vectors of the recipe's own text encoder.
        workspace: private folder; finished ways in its folder training are reused, kept connectors go to its
            folder models.
        device: as torch names devices.

    Raises:
        DataError: features that cannot be used, or a zoo of a single pair.
        RunError: a training diverged, or the disk is full; finished ways stay in the workspace.
    """
    zoo = open_content(recipe, content, device, store)
    for model in recipe.models:
        unknown = sorted(set(model.texts or ()) - set(zoo.texts))
        if unknown:  # arrays of one's own have names of their own
            raise DataError(
                f"model {model.name}: texts {', '.join(unknown)} are not in the zoo, which has "
                f"{', '.join(zoo.texts)}; name these, or set texts: null"
            )

    def train_one(model: AlignModelSettings, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        folder = training_folder(workspace, model.name, seed)
        task = Task(zoo, model, model.training or recipe.training, seed, folder, device)
        keep = workspace / "models" / model.name if model.keep_weights and seed == recipe.seeds[0] else None
        return finished_or(folder, partial(_connect_and_ask, task, keep))

    found = run_models(recipe, UNTRAINED, lambda _: _chance(zoo), train_one, once=CLOSED)
    scores = _scores(recipe, zoo, found)
    return Comparison(_Metrics(recipe, zoo, found).frame(), scores, [one.card for one in found])


def connect(task: Task) -> Outcome:
    """Connect every pair of a zoo in one way."""
    kind = task.model.kind
    if kind in ("ape", "direct"):
        return ape(task, together=kind == "direct")
    ways = {"hyper_align": hyper_align, "relative": relative_cosines, "search": search, "hub": hub}
    return ways[kind](task) if kind in ways else closed_form(task, kind)


def _connect_and_ask(task: Task, keep: Path | None, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train one way under one seed; results are what each image adds to each metric, by split and pair."""
    if task.model.centre:  # before anything is counted: means are kept
        for name in task.zoo.images:
            task.mean(name)
    seed_everything(task.seed)
    clock = Clock(task.device)
    outcome = connect(task)
    cost = clock.stop()
    results = {}
    for pair, connected in outcome.pairs.items():
        for split in ("valid", "test"):
            results["|".join((split, *pair))] = _asked_pairs(task, pair, connected, split)
        for asked in task.zoo.asked:
            if pair[1] in asked.images:
                results["|".join((f"set={asked.name}", *pair))] = _asked_classes(asked, pair, connected)
    about = {"model": task.model.name, "seed": task.seed, "settings": task.model.model_dump(mode="json")}
    card = {**about, "parameters": outcome.parameters, **cost, "flops": outcome.flops, **outcome.about}
    card["geometry"] = {"split": "test", **_placement(task, outcome.pairs)}
    if keep is not None:
        ConnectorZoo(linear_maps(outcome.pairs), task.model.name).keep(keep, about)
    return results, {**card, "pairs": len(outcome.pairs), "history": outcome.history}


@torch.inference_mode()
def _asked_pairs(task: Task, pair: Pair, connected: Connected, split: str) -> Float[Tensor, "V N"]:
    """Return what each image of a split adds to each recall."""
    zoo, rows = task.zoo, task.zoo.splits[split]
    captions = zoo.choices[rows]
    texts, images = zoo.texts[pair[0]].unit(captions.flatten()), zoo.images[pair[1]].unit(rows)
    mapped, images = both_sides(connected, texts, images)
    ranks = retrieval_ranks(mapped.unflatten(0, captions.shape), images)
    values = recall_values(*(one.numpy() for one in ranks))
    return torch.from_numpy(np.stack([values[name] for name in VALUES])).float()


@torch.inference_mode()
def _placement(task: Task, pairs: dict[Pair, Connected]) -> dict[str, float | int]:
    """Say how near first captions and their images lie, and how evenly captions do; means over pairs."""
    zoo = task.zoo
    rows = zoo.splits["test"][spaced(len(zoo.splits["test"]))]
    found = []
    for (text, image), connected in pairs.items():
        texts, images = zoo.texts[text].unit(zoo.choices[rows, 0]), zoo.images[image].unit(rows)
        mapped, images = both_sides(connected, texts, images)
        found.append(placement(mapped, images, mapped))
    return {key: sum(one[key] for one in found) / len(found) for key in found[0]}


@torch.inference_mode()
def _asked_classes(asked: Asked, pair: Pair, connected: Connected) -> Float[Tensor, "2 N"]:
    """Return whether each picture's true class is first, and among the first five."""
    prompts, images = asked.prompts[pair[0]], asked.images[pair[1]]
    everything = torch.arange(len(prompts)), torch.arange(len(images))
    mapped, features = both_sides(connected, prompts.unit(everything[0]), images.unit(everything[1]))
    classes = functional.normalize(mapped.view(asked.classes, -1, mapped.shape[1]).mean(1), dim=1)
    ranks, _ = class_ranks(features, classes, asked.label)
    values = accuracy_values(ranks.numpy(), np.full(len(ranks), asked.classes))
    return torch.from_numpy(np.stack([values["top1"], values["top5"]])).float()


def _chance(zoo: Zoo) -> dict[str, Tensor]:
    """Return the expected values of a guess."""
    found = {}
    for split in ("valid", "test"):
        count, most = len(zoo.splits[split]), zoo.choices.shape[1]
        guess = [min(1.0, k / count) for k in RECALLS]
        whole = count * most
        guess += [1 - comb(whole - most, k) / comb(whole, k) for k in RECALLS]
        table = torch.tensor(guess)[:, None].expand(-1, count).contiguous()
        found |= {"|".join((split, *pair)): table.clone() for pair in zoo.pairs(controls=True)}
    for asked in zoo.asked:
        guess = torch.tensor([1 / asked.classes, min(1.0, 5 / asked.classes)])
        table = guess[:, None].expand(-1, len(asked.label)).contiguous()
        found |= {f"set={asked.name}|{text}|{image}": table.clone()
                  for text, image in zoo.pairs() if image in asked.images}  # fmt: skip
    return found


@dataclass(frozen=True)
class _Table:
    """Recalls of the pairs that some ways all have.

    Attributes:
        values: by metric, ``[S, P, N]``.
        drawn: of R@10 under each resample, ``[S, P, R]``.
    """

    values: dict[str, np.ndarray]
    drawn: dict[str, np.ndarray]


class _Metrics:
    """Metric rows in the making."""

    def __init__(self, recipe: HyperAlignRecipe, zoo: Zoo, found: list[Found]) -> None:
        self.recipe, self.zoo, self.found, self.rows = recipe, zoo, found, []
        self.against = {model.name: model.against for model in recipe.models}

    def frame(self) -> pl.DataFrame:
        """Measure everything."""
        every = self.zoo.pairs()
        groups = {"all": every}
        groups |= {f"text={text}": [pair for pair in every if pair[0] == text] for text in self.zoo.texts}
        for group, pairs in groups.items():
            items = [
                one for one in self.found if all("|".join(("test", *pair)) in one.results for pair in pairs)
            ]
            if items:
                self._measure_group(group, pairs, items)
        self._measure_each(self.zoo.pairs(controls=True))
        for asked in self.zoo.asked:
            self._measure_classes(asked)
        self._measure_cost()
        same = {"paper": self.recipe.paper, "recipe": self.recipe.name, "dataset": self.recipe.data.name}
        return pl.DataFrame([{**same, **row} for row in self.rows], schema=METRIC_COLUMNS)

    def _add(
        self,
        place: tuple[str, str, int],
        metric: str,
        measured: Measured,
        items: list[Found],
        alone: bool = False,
    ) -> None:
        """Add one metric's rows; ``alone`` leaves differences to other ways out."""
        against = dict.fromkeys(self.against) if alone else self.against
        split, group, count = place
        found = metric_rows(metric, measured, items, against, "" if alone else self.recipe.reference)
        self.rows += [{"split": split, "group": group, "count": count, **row} for row in found]

    def _table(self, split: str, pairs: list[Pair], items: list[Found]) -> _Table:
        """Gather recalls and draw images anew, alike for all ways and pairs."""
        kept = np.stack(
            [[one.results["|".join((split, *pair))].numpy() for pair in pairs] for one in items]
        ).astype(float)
        values = {name: kept[:, :, place] for place, name in enumerate(VALUES)}
        values |= {
            f"recall_at_{k}": (values[f"t2i_recall_at_{k}"] + values[f"i2t_recall_at_{k}"]) / 2
            for k in RECALLS
        }
        count = kept.shape[-1]
        rng = np.random.default_rng(0)
        weights = rng.multinomial(count, np.full(count, 1 / count), size=self.recipe.resamples).T / count
        return _Table(values, {name: one @ weights for name, one in values.items()})

    def _measure_group(self, group: str, pairs: list[Pair], items: list[Found]) -> None:
        """Mean recalls over the pairs of a group; on test also how the ways rank and choose them."""
        tables = {split: self._table(split, pairs, items) for split in ("valid", "test")}
        for split, table in tables.items():
            place = (split, group, len(self.zoo.splits[split]))
            for metric, values in table.values.items():
                self._add(place, metric, Measured(values.mean((1, 2)), table.drawn[metric].mean(1)), items)
        if len(pairs) < 3 or not any(one.model == self.recipe.reference for one in items):
            return
        place = ("test", group, len(pairs))
        for metric, measured in _choices(tables, items, self.recipe.reference).items():
            self._add(place, metric, measured, items, alone=True)

    def _measure_each(self, pairs: list[Pair]) -> None:
        """R@10 of every pair, and its mean for every image encoder over the text encoders."""
        by_image = {
            f"image={image}": [pair for pair in pairs if pair[1] == image] for image in self.zoo.images
        }
        by_pair = {f"pair={text} -> {image}": [(text, image)] for text, image in pairs}
        count = len(self.zoo.splits["test"])
        for group, own in (by_image | by_pair).items():
            items = [
                one for one in self.found if all("|".join(("test", *pair)) in one.results for pair in own)
            ]
            if items:
                table = self._table("test", own, items)
                measured = Measured(table.values[MAIN].mean((1, 2)), table.drawn[MAIN].mean(1))
                self._add(("test", group, count), MAIN, measured, items, alone=group.startswith("pair"))

    def _measure_classes(self, asked: Asked) -> None:
        """Zero-shot accuracy, mean over the pairs whose image encoder saw the class set's pictures."""
        pairs = [pair for pair in self.zoo.pairs() if pair[1] in asked.images]
        keys = [f"set={asked.name}|{text}|{image}" for text, image in pairs]
        items = [one for one in self.found if all(key in one.results for key in keys)]
        if not items:
            return
        kept = np.stack([[one.results[key].numpy() for key in keys] for one in items]).mean(1).astype(float)
        count = kept.shape[-1]
        rng = np.random.default_rng(0)
        weights = rng.multinomial(count, np.full(count, 1 / count), size=self.recipe.resamples)
        for place, metric in enumerate(("top1", "top5") if asked.classes > 9 else ("top1",)):
            values = kept[:, place]
            measured = Measured(values.mean(1), values @ weights.T / count)
            self._add(("test", f"set={asked.name}", count), metric, measured, items)

    def _measure_cost(self) -> None:
        """Operations, seconds and parameters, whole and by pair, and shares of baselines'; no interval."""
        items = [one for one in self.found if one.seed is not None]
        kept = ("flops", "seconds", "parameters", "pairs")
        cards = pl.DataFrame({what: [float(one.card[what]) for one in items] for what in kept})
        costs = cards.with_columns((pl.all().exclude("pairs") / pl.col("pairs")).name.suffix("_per_pair"))
        for other in sorted({self.recipe.reference, *filter(None, self.against.values())}):
            theirs = costs.filter(pl.Series([one.model == other for one in items]))["flops_per_pair"].mean()
            if theirs:
                costs = costs.with_columns((pl.col("flops_per_pair") / theirs).alias(f"flops_of_{other}"))
        for column in costs.drop("pairs"):
            values = column.to_numpy()
            measured = Measured(values, values[:, None])
            self._add(("test", "cost", len(items)), column.name, measured, items, alone=True)


def _choices(tables: dict[str, _Table], items: list[Found], reference: str) -> dict[str, Measured]:
    """Hold each way's ranking of the pairs against the full grid's.

    The truth for a seed is the grid's mean over the other seeds, so that the grid itself shows how far one
    seed agrees with another: a ceiling. A pair is chosen on valid; its regret is what the truth says is lost.
    Among pairs that are best there alike the choice is as if drawn: their mean counts.
    """
    score, drawn = tables["test"].values[MAIN].mean(2), tables["test"].drawn[MAIN]
    valid = tables["valid"].values[MAIN].mean(2)
    chosen = valid >= valid.max(1, keepdims=True) - TIE
    grid = [place for place, one in enumerate(items) if one.model == reference]
    found: dict[str, list[tuple[float, np.ndarray]]] = {
        name: [] for name in ("rank_agreement", "ndcg_at_5", "regret", f"chosen_{MAIN}")
    }
    for place, one in enumerate(items):
        others = [row for row in grid if items[row].seed != one.seed] or grid
        truth, drawn_truth = score[others].mean(0), drawn[others].mean(0)
        pick, best = chosen[place], int(truth.argmax())
        gains = gain_of_order(score[place], truth, 5)
        found["rank_agreement"].append(
            (rank_agreement(score[place], truth), rank_agreement(drawn[place], drawn_truth))
        )
        found["ndcg_at_5"].append((gains, np.full(drawn.shape[-1], gains)))
        found["regret"].append(
            (truth[best] - truth[pick].mean(), drawn_truth[best] - drawn_truth[pick].mean(0))
        )
        found[f"chosen_{MAIN}"].append((score[place, pick].mean(), drawn[place, pick].mean(0)))
    return {
        name: Measured(np.array([float(value) for value, _ in rows]), np.stack([part for _, part in rows]))
        for name, rows in found.items()
    }


def _scores(recipe: HyperAlignRecipe, zoo: Zoo, found: list[Found]) -> pl.DataFrame:
    """One row per way, seed, split and pair, with what is known of the two encoders; no text."""
    rows = []
    for one in found:
        for split in ("valid", "test"):
            for text, image in zoo.pairs(controls=True):
                values = one.results.get("|".join((split, text, image)))
                if values is None:
                    continue
                row = {"model": one.model, "seed": one.seed, "split": split, "text": text, "image": image}
                row |= {"text_width": zoo.texts[text].width, "image_width": zoo.images[image].width}
                row["image_parameters"] = zoo.images[image].parameters
                row["control"] = image in zoo.controls
                row |= dict(zip(VALUES, values.mean(1).tolist(), strict=True))
                for asked in zoo.asked if split == "test" else ():
                    top = one.results.get(f"set={asked.name}|{text}|{image}")
                    if top is not None:
                        row[f"top1 {asked.name}"] = float(top[0].mean())
                rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)
