"""Trains and measures every model of a Hyper-CL recipe; a killed run loses one model at most."""

import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from workbench.evaluation.similarity import METRICS, Measured, measure
from workbench.files import write_atomic
from workbench.hypernetworks import health_of
from workbench.papers.hyper_cl import (
    UNTRAINED,
    ConditionedHead,
    Encoded,
    HyperCLRecipe,
    ModelSettings,
    PairLoss,
    encode_splits,
    head_scores,
)
from workbench.store import EmbeddingStore
from workbench.training import Training, fit, seed_everything

SPLITS = ("valid", "test")
_ORDER = {"seen": 0, "rephrased": 1, "unseen": 2}  # how new a condition is
METRIC_COLUMNS = {
    "paper": pl.String,
    "recipe": pl.String,
    "dataset": pl.String,
    "split": pl.String,
    "model": pl.String,
    "group": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "count": pl.Int64,
    "seed": pl.Int64,
}


@dataclass(frozen=True)
class Comparison:
    """What a recipe's run found.

    Attributes:
        metrics: long form; seed is null for the mean over seeds, and for models that have none.
        scores: one row per model, seed, split and data row; no text.
        cards: per trained model: settings, parameters, seconds, loss by epoch, health and cost.
    """

    metrics: pl.DataFrame
    scores: pl.DataFrame
    cards: list[dict[str, Any]]


def compare(
    recipe: HyperCLRecipe,
    tables: dict[str, pl.DataFrame],
    store: EmbeddingStore,
    workspace: Path,
    device: str,
) -> Comparison:
    """Run a recipe.

    Args:
        recipe: settings.
        tables: the splits, as :func:`workbench.datasets.pairs.load_pairs` returns them.
        store: embeds texts; opened with tokens if a model pools them.
        workspace: private folder; finished models in its folder training are reused, kept heads go to its
            folder models.
        device: as torch names devices.

    Raises:
        RunError: a training diverged, or the disk is full; finished models stay in the workspace.
    """
    encoded = encode_splits(tables, store, device)
    jobs = [
        (model, seed)
        for model in recipe.models
        for seed in ((None,) if model.kind in UNTRAINED else recipe.seeds)
    ]
    found: list[tuple[str, int | None, dict[str, Tensor], dict[str, Any]]] = []
    bar = tqdm(jobs, desc=recipe.name, unit="model")
    for model, seed in bar:
        bar.set_postfix_str(model.name if seed is None else f"{model.name}, seed {seed}")
        if seed is None:
            scores = {
                split: baseline_scores(model.kind, encoded, tables, store, split)
                for split in SPLITS
                if split in tables
            }
            card: dict[str, Any] = {
                "model": model.name,
                "seed": None,
                "settings": model.model_dump(mode="json"),
            }
        else:
            scores, card = _trained(recipe, model, seed, encoded, workspace, device)
        found.append((model.name, seed, scores, card))
    return Comparison(
        metrics=_metrics(recipe, tables, [item[:3] for item in found]),
        scores=_score_table(tables, [item[:3] for item in found]),
        cards=[item[3] for item in found],
    )


def _trained(
    recipe: HyperCLRecipe, model: ModelSettings, seed: int, encoded: Encoded, workspace: Path, device: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train one model under one seed and score it, or read what an earlier process finished."""
    folder = workspace / "training" / f"{model.name}-seed{seed}"
    if (folder / "card.json").is_file():
        return load_file(folder / "scores.safetensors"), json.loads((folder / "card.json").read_text("utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(seed)
    started = time.perf_counter()
    features = encoded.condition_features(model)
    head = ConditionedHead(model, encoded.sentences.shape[1], features.shape[1]).to(device)
    start = head.generator.head.weight.detach().clone() if head.generator is not None else None
    loss = PairLoss(head, encoded)
    changes = {"learning_rate": model.learning_rate} if model.learning_rate else {}
    training = Training(**{**recipe.training.model_dump(), **changes})
    history = fit(head, loss, loss.count, training, folder, seed=seed)
    seconds = time.perf_counter() - started
    scores = {
        split: head_scores(head, encoded, encoded.splits[split])
        for split in SPLITS
        if split in encoded.splits
    }
    card = {
        "model": model.name,
        "seed": seed,
        "settings": model.model_dump(mode="json"),
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
        "seconds": round(seconds, 2),
        "peak_process_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "history": history,
    }
    if start is not None:
        trained = torch.unique(encoded.splits["train"].condition)[:256]
        card["health"] = health_of(head.generator, features[trained], start).to_dict()
        card["cost"] = head.generator.cost()
    if model.keep_weights and seed == recipe.seeds[0]:
        kept = workspace / "models" / model.name
        width, condition_width = encoded.sentences.shape[1], features.shape[1]
        about = {"settings": card["settings"], "width": width, "condition_width": condition_width}
        write_atomic(kept / "head.json", json.dumps({**about, "encoder": recipe.encoder}, indent=1))
        write_atomic(kept / "head.safetensors", save({k: v.cpu() for k, v in head.state_dict().items()}))
    write_atomic(folder / "scores.safetensors", save(scores))
    write_atomic(folder / "card.json", json.dumps(card, indent=1))  # last: its presence means all is there
    for left in folder.glob("checkpoint.*"):
        left.unlink()
    return scores, card


def baseline_scores(
    kind: str, encoded: Encoded, tables: dict[str, pl.DataFrame], store: EmbeddingStore, split: str
) -> Float[Tensor, " N"]:
    """Score a split without training a head.

    Args:
        kind: "cosine" (of the plain sentences), "prompt" (of "condition: sentence" texts, encoded as such) or
            "condition_only" (a ridge regression from the condition's embedding to the label, the floor).
        encoded: the splits.
        tables: the same splits as texts.
        store: encodes the prompts.
        split: which split to score.
    """
    rows = encoded.splits[split]
    if kind == "cosine":
        return functional.cosine_similarity(
            encoded.sentences[rows.first], encoded.sentences[rows.second]
        ).cpu()
    if kind == "prompt":
        table = tables[split]
        sides = [
            [
                f"{condition.rstrip('.')}: {text}"
                for condition, text in table.select("condition", side).iter_rows()
            ]
            for side in ("sentence1", "sentence2")
        ]
        store.prepare([*sides[0], *sides[1]])
        return functional.cosine_similarity(store.embed(sides[0]), store.embed(sides[1]))
    from sklearn.linear_model import RidgeCV

    train = encoded.splits["train"]
    features = encoded.conditions.cpu().numpy()
    ridge = RidgeCV(alphas=[10.0**power for power in range(-1, 5)])
    ridge.fit(features[train.condition.cpu()], train.label.cpu().numpy())
    return torch.from_numpy(ridge.predict(features[rows.condition.cpu()])).float()


def _metrics(
    recipe: HyperCLRecipe,
    tables: dict[str, pl.DataFrame],
    found: list[tuple[str, int | None, dict[str, Tensor]]],
) -> pl.DataFrame:
    """Measure all models on all splits and groups, each model as a whole and against the reference."""
    rows = []
    cells = [
        (split, group) for split in SPLITS if split in tables for group in _groups(tables[split], recipe)
    ]
    for split, (group, mask) in tqdm(cells, desc="intervals", unit="group", leave=False):
        table = tables[split].filter(mask)
        scores = np.stack([score[split].numpy().astype(float)[mask.to_numpy()] for _, _, score in found])
        measured = measure(
            scores, table["label"].to_numpy(), table["pair"].to_numpy(), resamples=recipe.resamples
        )
        place = {"split": split, "group": group, "count": table.height}
        for metric in METRICS:
            rows += [{**place, **row} for row in _rows(metric, measured[metric], found, recipe)]
    same = {"paper": recipe.paper, "recipe": recipe.name, "dataset": recipe.data.name}
    return pl.DataFrame([{**same, **row} for row in rows], schema=METRIC_COLUMNS)


def _rows(
    metric: str,
    measured: Measured,
    found: list[tuple[str, int | None, dict[str, Tensor]]],
    recipe: HyperCLRecipe,
) -> list[dict[str, Any]]:
    """List one metric's rows: every seed, the mean over seeds, and the mean's difference to the baselines."""
    rows, means = [], {}
    for name in dict.fromkeys(name for name, _, _ in found):
        members = [index for index, item in enumerate(found) if item[0] == name]
        if not np.isfinite(measured.value[members]).all():
            continue  # undefined: AUC of graded labels, a group with one class, a constant score
        means[name] = measured.value[members].mean(), measured.resampled[members].mean(0)
        for index in members:
            if found[index][1] is not None:
                row = _row(name, metric, measured.value[index], measured.resampled[index])
                rows.append({**row, "seed": found[index][1]})
    against = {model.name: model.against for model in recipe.models}
    for name, (value, resampled) in means.items():
        rows.append(_row(name, metric, value, resampled))
        for other in sorted({recipe.reference, against[name]} & means.keys() - {name}):
            versus = f"{metric}_minus_{other}"
            rows.append(_row(name, versus, value - means[other][0], resampled - means[other][1]))
    return rows


def _row(name: str, metric: str, value: float, resampled: np.ndarray) -> dict[str, Any]:
    """Write one value with its interval; seed is left empty."""
    low, high = Measured.interval(resampled)
    return {"model": name, "metric": metric, "value": float(value), "low": low, "high": high, "seed": None}


def _groups(table: pl.DataFrame, recipe: HyperCLRecipe) -> list[tuple[str, pl.Series]]:
    """List the groups of a split as name and row mask: the whole, then every value of the columns asked for.

    A column with one value says nothing that the whole does not, and is left out.
    """
    groups = [("all", pl.repeat(True, table.height, eager=True))]
    for column in recipe.group_by:
        if column in table.columns and table[column].n_unique() > 1:
            groups += [
                (f"{column}={value}", table[column].eq_missing(value))
                for value in sorted(
                    table[column].drop_nulls().unique(), key=lambda value: (_ORDER.get(value, 0), value)
                )
            ]
    return groups


def _score_table(
    tables: dict[str, pl.DataFrame], found: list[tuple[str, int | None, dict[str, Tensor]]]
) -> pl.DataFrame:
    """Lay all scores out as one table; the data's texts are not part of it."""
    parts = []
    for name, seed, scores in found:
        for split, values in sorted(scores.items()):  # read from a file, they come in another order
            table = tables[split].select("pair", "label", "condition_kind").with_row_index("row")
            about = {"split": pl.lit(split), "model": pl.lit(name), "seed": pl.lit(seed, dtype=pl.Int64)}
            parts.append(table.with_columns(score=pl.Series(values.numpy().astype(np.float32)), **about))
    return pl.concat(parts)
