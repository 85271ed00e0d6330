"""Runs -> the sections of a report page: headings with sentences, a figure and a table each."""

from dataclasses import dataclass
from typing import Any

import polars as pl
from markupsafe import Markup

from workbench.errors import RecipeError
from workbench.figures import groups_figure, history_figure, models_figure
from workbench.figures_zoo import agreement_figure, cost_figure, pair_matrix_figure, scale_figure
from workbench.papers import load_recipe
from workbench.runs import Run
from workbench.tables import (
    Table,
    adds,
    bar_table,
    best_first,
    card_table,
    findings,
    last_split,
    main_metric,
    model_table,
    published_table,
    score_table,
)
from workbench.zoo_tables import (
    agreement_table,
    best_ways,
    encoder_table,
    scale_table,
    ways_table,
    zoo_findings,
)

HOW = (
    "Every value is the mean over seeds; the interval is a 95 % bootstrap over sentence pairs (graphs: "
    "triples, pictures: images) of that mean, so it covers which were drawn, and the spread over seeds "
    "stands beside it. Differences are paired: the same resamples for both models."
)
_BARS = (
    "Set by this project, some of them after a first look, and some settings were chosen knowing the bar: a "
    "bar that is met is no test passed blind. The verdict is the mean's, whatever its interval reaches."
)
HOW_SEEDS = (
    "Every value is the mean over seeds; the interval is Student's t over them, since a seed draws tasks, "
    "data order and start. Differences are taken seed by seed. Settings are small on purpose: these are "
    "experiments for one core, not reproductions at published size."
)
HOW_CARDS = "One seed; seconds on this machine."
_GEOMETRY = (
    "Alignment is the mean squared distance of embeddings that belong together (0 to 4, ideal 0): sentences "
    "that agree under a condition, queries and their tails, images and their class names or captions, texts "
    "that say the same. Uniformity is how evenly embeddings fill the sphere (about -4 if evenly, 0 if all "
    "are one point); a space that collapses is perfectly aligned."
)
_ADDED = (
    "Generated / own is the norm of what is added to a layer over the norm of the layer's own weights, the "
    "largest over layers and conditions (sound from 0.0001 to 10)."
)
_ZOO = "hyper_align"  # the paper whose runs are about pairs of encoders
_TOLD_APART = ("pair", "image")  # groups of such a run that its own sections tell in one table or map


@dataclass(frozen=True)
class Section:
    """One heading with sentences, a figure and a table, each optional."""

    title: str
    lines: list[str]
    table: Table | None = None
    figure: Markup | None = None
    folded: bool = False


def run_sections(run: Run) -> list[Section]:
    """Lay out one run's report."""
    metrics, main = run.metrics, main_metric(run)
    split = last_split(metrics)
    sections = [Section("What was found", said_of(run))]
    if reading_of(run):
        sections.append(Section("How to read it", [reading_of(run)]))
    if run.recipe["bars"]:
        sections.append(Section("Bars", [_BARS], bar_table(run)))
    if run.recipe["published"]:
        lines = [
            "Numbers on one scale, 0 to 1. Where encoder, split or protocol differ, the verdict is "
            "'not comparable'."
        ]
        sections.append(Section("Published beside reproduced", lines, published_table(run)))
    figure = _div(models_figure(metrics, run.recipe["models"], main, split))
    sections.append(
        Section("All models", [HOW_SEEDS if "metric" in run.recipe else HOW], score_table(run), figure)
    )
    if run.recipe["paper"] == _ZOO:
        sections += _zoo_sections(run)
    shown = model_table(run).sort(main, descending=best_first(run), nulls_last=True)["model"].to_list()[:3]
    shown = list(dict.fromkeys([*shown, run.recipe["reference"]]))
    sections += _group_sections(run, shown)
    sections.append(Section("Cost and health of each head", how_cards(run), card_table(run)))
    if any(card.get("history") for card in run.cards if card["model"] in shown):
        sections.append(Section("Training", [], figure=_div(history_figure(run.cards, shown))))
    return sections


def _group_sections(run: Run, shown: list[str]) -> list[Section]:
    """Show some models over the groups of each column, and every group's table folded away."""
    metrics, main = run.metrics, main_metric(run)
    split = last_split(metrics)
    groups = [
        name for name in metrics.filter(split=split)["group"].unique(maintain_order=True) if "=" in name
    ]
    sections = []
    for column in dict.fromkeys(group.split("=")[0] for group in groups):
        if run.recipe["paper"] == _ZOO and column in _TOLD_APART:
            continue
        values = [group for group in groups if group.startswith(f"{column}=")]
        measured = set(metrics.filter(pl.col("group").is_in(values), split=split)["metric"])
        drawn = main if main in measured else "top1" if "top1" in measured else None
        figure = _div(groups_figure(metrics, shown, drawn, column, split)) if drawn else None
        title = "Worst group and gap" if column == "by" else f"By {column.replace('_', ' ')}"
        sections.append(Section(title, [], figure=figure))
        sections += [
            Section(value.replace("=", ": "), [], score_table(run, value), folded=True) for value in values
        ]
    return sections


def _zoo_sections(run: Run) -> list[Section]:
    """Show what only a zoo of encoders has: pairs, cost, agreement with the full grid, scale."""
    models, reference = run.recipe["models"], run.recipe["reference"]
    ways = [model for model in models if model["kind"] != "chance"]
    best = best_ways(run)
    cost = "Operations of training by torch's counter, optimiser steps and the features themselves left out."
    aim = (
        "Rank agreement is Spearman's with the full grid's ranking of the pairs, the grid's other seeds for "
        "the grid itself; regret is what the grid says is lost with the pair chosen on valid. Both only say "
        "how like the grid a way is: one that connects better may rank otherwise and be right. Images drawn "
        "again for the interval repeat some and miss others, which lowers it: it may lie below the value."
    )
    size = "The pair is chosen on valid and scored on test; N encoders mean all subsets of that size alike."
    return [
        Section("Cost and quality", [cost], ways_table(run), _div(cost_figure(run.metrics, models))),
        Section(f"Pairs: {reference}", [], figure=_div(pair_matrix_figure(run.scores, reference, reference))),
        *(
            Section(f"Pairs: {name}", [], figure=_div(pair_matrix_figure(run.scores, name, reference)))
            for name in best
        ),
        Section(
            "Agreement with the full grid", [aim], agreement_table(run),
            _div(agreement_figure(run.scores, run.metrics, ways, reference)),
        ),
        Section("Scale", [size], scale_table(run), _div(scale_figure(run.scores, ways))),
        Section("Image encoders", [], encoder_table(run)),
    ]  # fmt: skip


def how_cards(run: Run) -> list[str]:
    """Say how the table of cards is to be read."""
    geometry = any("geometry" in card for card in run.cards)
    return [HOW_CARDS, *([_ADDED] if adds(run) else []), *([_GEOMETRY] if geometry else [])]


def said_of(run: Run) -> list[str]:
    """Say in sentences what a run's numbers say."""
    return [*findings(run), *(zoo_findings(run) if run.recipe["paper"] == _ZOO else [])]


def reading_of(run: Run) -> str:
    """Return what the recipe's authors say of its results, unless the run was made on other data."""
    try:
        recipe = load_recipe(run.recipe["name"])
    except RecipeError:  # a recipe of the user's own, given by path
        return ""
    if recipe.data.name != run.recipe["data"]["name"] or not recipe.reading:
        return ""
    return recipe.reading if is_current(run) else f"(Settings have changed since this run.) {recipe.reading}"


def is_current(run: Run) -> bool:
    """Whether a run was made with the settings that its recipe has now, defaults included."""
    try:
        return load_recipe(run.recipe["name"]).hash == run.provenance["recipe_sha256"]
    except RecipeError:
        return True


def _div(figure: Any) -> Markup:
    """Turn a figure into HTML without the library, which the page brings once."""
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False))
