"""Trains and measures every model of a Hyper-CL recipe; a killed run loses one model at most."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from workbench.datasets.pairs import load_pairs
from workbench.encoders import TextEncoder
from workbench.evaluation.similarity import METRICS, measure
from workbench.files import digest
from workbench.geometry.uniformity import placement, spaced
from workbench.hypernetworks import health_of
from workbench.papers.comparison import (
    METRIC_COLUMNS,
    Clock,
    Comparison,
    Found,
    Loaded,
    card_of,
    finished_or,
    finished_results,
    keep_head,
    metric_rows,
    run_models,
    training_folder,
)
from workbench.papers.hyper_cl import (
    ConditionedHead,
    Encoded,
    PairLoss,
    Source,
    Split,
    encode_splits,
    head_scores,
)
from workbench.papers.hyper_cl_finetuning import TriEncoder, finetuned
from workbench.papers.hyper_cl_settings import JOINT, UNTRAINED, HyperCLRecipe, ModelSettings
from workbench.store import EmbeddingStore
from workbench.training import fit, seed_everything

RECIPE = HyperCLRecipe
SPLITS = ("valid", "test")
_ORDER = {"seen": 0, "rephrased": 1, "unseen": 2}  # how new a condition is


def needs_tokens(recipe: HyperCLRecipe) -> bool:
    """Tell whether a model pools the token states of a frozen encoder."""
    return recipe.finetuning is None and any(model.pooling != "sentence" for model in recipe.models)


def load_data(recipe: HyperCLRecipe) -> Loaded:
    """Read the recipe's pairs; see :func:`workbench.datasets.pairs.load_pairs`."""
    tables = load_pairs(recipe.data)
    counts = {
        split: {
            "rows": table.height,
            "pairs": table["pair"].n_unique(),
            "conditions": table["condition"].n_unique(),
        }
        for split, table in tables.items()
    }
    sha256 = digest(*(f"{split} {table.write_json()}" for split, table in sorted(tables.items())))
    return Loaded(tables, sha256, counts)


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
    wanted = [split for split in SPLITS if split in tables]

    def baseline(kind: str) -> dict[str, Tensor]:
        return {split: baseline_scores(kind, encoded, tables, store, split) for split in wanted}

    def train(model: ModelSettings, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        job = _Job(recipe, model, seed, encoded, store.encoder, workspace)
        return finished_or(training_folder(workspace, model.name, seed), job.train)

    found = run_models(recipe, UNTRAINED, baseline, train)
    return Comparison(
        metrics=_metrics(recipe, tables, found),
        scores=_score_table(tables, found),
        cards=[item.card for item in found],
    )


@dataclass(frozen=True)
class _Job:
    """One model under one seed."""

    recipe: HyperCLRecipe
    model: ModelSettings
    seed: int
    encoded: Encoded
    encoder: TextEncoder
    workspace: Path

    def train(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Train and score; results are the scores by split."""
        recipe, model, encoded = self.recipe, self.model, self.encoded
        device = encoded.sentences.device
        seed_everything(self.seed)
        clock = Clock(device)
        width, condition_width = encoded.sentences.shape[1], encoded.condition_features(model).shape[1]
        head = ConditionedHead(model, width, condition_width).to(device)
        start = head.generator.head.weight.detach().clone() if head.generator is not None else None
        source, module, rates = encoded, head, {}
        if recipe.finetuning:
            source = finetuned(self.encoder, recipe.finetuning, encoded, model.kind).to(device)
            module = nn.ModuleDict({"head": head, "encoder": source})
            rates = {"encoder.reader.": recipe.finetuning.learning_rate}
        loss = PairLoss(head, source, teacher=self._teacher())
        training = recipe.training.at_rate(model.learning_rate)
        history = fit(module, loss, loss.count, training, folder, seed=self.seed, rates=rates)
        cost = clock.stop()
        tuned = source
        if isinstance(source, TriEncoder):
            source = source.encoded(tokens=model.pooling != "sentence")
        taught = ("train",) if model.name in {other.teacher for other in recipe.models} else ()
        wanted = [split for split in (*SPLITS, *taught) if split in encoded.splits]
        scores = {split: head_scores(head, source, source.splits[split]) for split in wanted}
        card = card_of(model, self.seed, module, cost, history)
        if model.kind != "cross_encoder":  # which embeds no sentence by itself
            last = next(split for split in reversed(SPLITS) if split in source.splits)
            card["geometry"] = {"split": last, **head_geometry(head, source, source.splits[last])}
        if model.kind not in JOINT:
            tokens = source.tokens if model.pooling != "sentence" else None
            length = 0.0 if tokens is None else float(tokens.offsets.diff().double().mean())
            card["operations"] = head.operations(length)
        if start is not None:
            known = torch.unique(encoded.splits["train"].condition)[:256]
            card["health"] = health_of(
                head.generator, source.condition_features(model)[known], start
            ).to_dict()
            card["cost"] = head.generator.cost()
        if model.keep_weights and self.seed == recipe.seeds[0] and model.kind not in JOINT:
            self._keep(head, tuned if recipe.finetuning else None, card)
        return scores, card

    def _teacher(self) -> Float[Tensor, " N"] | None:
        """Return the teacher's scores of train under the same seed."""
        if not self.model.teacher:
            return None
        return finished_results(self.workspace, self.model.teacher, self.seed)["train"]

    def _keep(self, head: ConditionedHead, tuned: TriEncoder | None, card: dict[str, Any]) -> None:
        """Keep a trained head with the run, and the encoder if it was trained too."""
        kept = self.workspace / "models" / self.model.name
        about = {"settings": card["settings"], "width": head.width, "condition_width": head.condition_width}
        about |= {"encoder": self.recipe.encoder, "unit": True}
        if tuned is not None:
            about |= {"encoder": "encoder", "unit": tuned.reader.normalise}
            tuned.reader.save(self.encoder, kept / "encoder")
        keep_head(kept, head, about)


@torch.inference_mode()
def head_geometry(head: ConditionedHead, source: Source, split: Split) -> dict[str, float | int | None]:
    """Say how a head's embeddings lie: how near what should be equal, and how evenly all fill the sphere.

    Args:
        head: trained.
        source: where its inputs come from.
        split: whose rows; of more than 2,048, as many evenly spaced ones.

    Returns:
        As :func:`workbench.geometry.uniformity.placement`; positives are the two sentences of each row with
        label 1, under its condition, and points the distinct first sentences, each under its condition.
    """

    def embedded(rows: Int[Tensor, " N"]) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]:
        found = [source.compare(head, split, part)[1:] for part in rows[spaced(len(rows))].split(1024)]
        return tuple(torch.cat([sides[place].float().cpu() for sides in found]) for place in (0, 1))

    same = (split.label == 1).nonzero()[:, 0]
    asked = torch.stack([split.first, split.condition]).cpu().numpy()
    each = torch.from_numpy(np.unique(asked, axis=1, return_index=True)[1]).to(same)
    points = embedded(each)[0]
    return placement(*(embedded(same) if len(same) else (points[:0], points[:0])), points)


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


def _metrics(recipe: HyperCLRecipe, tables: dict[str, pl.DataFrame], found: list[Found]) -> pl.DataFrame:
    """Measure all models on all splits and groups, each model as a whole and against the reference."""
    rows = []
    cells = [
        (split, group) for split in SPLITS if split in tables for group in _groups(tables[split], recipe)
    ]
    against = {model.name: model.against for model in recipe.models}
    for split, (group, mask) in tqdm(cells, desc="intervals", unit="group", leave=False):
        for column in ("label", "relabel"):
            if column not in tables[split].columns:
                continue
            chosen = mask & tables[split][column].is_not_null()
            table = tables[split].filter(chosen)
            scores = np.stack(
                [item.results[split].numpy().astype(float)[chosen.to_numpy()] for item in found]
            )
            measured = measure(
                scores, table[column].to_numpy(), table["pair"].to_numpy(), resamples=recipe.resamples
            )
            place = {"split": split, "group": group, "count": table.height}
            for metric in METRICS:
                name = metric if column == "label" else f"{metric}_relabelled"
                found_rows = metric_rows(name, measured[metric], found, against, recipe.reference)
                rows += [{**place, **row} for row in found_rows]
    same = {"paper": recipe.paper, "recipe": recipe.name, "dataset": recipe.data.name}
    return pl.DataFrame([{**same, **row} for row in rows], schema=METRIC_COLUMNS)


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


def _score_table(tables: dict[str, pl.DataFrame], found: list[Found]) -> pl.DataFrame:
    """Lay all scores out as one table; the data's texts are not part of it."""
    parts = []
    for item in found:
        for split in (split for split in SPLITS if split in tables):
            values = item.results[split]
            table = tables[split].select("pair", "label", "condition_kind").with_row_index("row")
            about = {"split": pl.lit(split), "model": pl.lit(item.model)}
            about["seed"] = pl.lit(item.seed, dtype=pl.Int64)
            parts.append(table.with_columns(score=pl.Series(values.numpy().astype(np.float32)), **about))
    return pl.concat(parts)
