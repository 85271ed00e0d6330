"""Scores of every pair of a zoo -> frames that tables and figures share: means, scale, groups of encoders.

Quality is R@10 of captions and images, the mean of both directions; 0 to 1, higher is better.
"""

from typing import Any

import polars as pl

from workbench.evaluation.retrieval import expected_best

MAIN = "recall_at_10"
_WIDTHS = (64, 512, 1024)  # upper edges, in numbers per feature
_PARAMETERS = (0, 1_000_000, 30_000_000, 120_000_000)  # upper edges; the last two are the poster's
_BOTH = (pl.col(f"t2i_{MAIN}") + pl.col(f"i2t_{MAIN}")) / 2


def pair_means(scores: pl.DataFrame, split: str = "test") -> pl.DataFrame:
    """Return each way's R@10 of every pair, mean over seeds, controls included.

    Args:
        scores: of a run.
        split: which split.

    Returns:
        One row per way and pair: model, text, image, image_width, image_parameters, control, value.
    """
    keys = ["model", "text", "image", "image_width", "image_parameters", "control"]
    found = scores.filter(split=split).group_by(keys, maintain_order=True)
    return found.agg(_BOTH.mean().alias("value"))


def image_order(scores: pl.DataFrame, reference: str) -> list[str]:
    """Return the image encoders, best first by the reference's mean over text encoders; controls last."""
    means = pair_means(scores)
    own = means.filter(model=reference)
    own = means if own.is_empty() else own
    ranked = own.group_by("image", "control", maintain_order=True).agg(pl.col("value").mean())
    return ranked.sort("control", -pl.col("value"), maintain_order=True)["image"].to_list()


def pair_axes(scores: pl.DataFrame, reference: str) -> tuple[list[str], list[str], list[str]]:
    """Return what the map of all pairs is laid out by: text encoders, image encoders, and controls.

    Both kinds of image encoders stand in the reference's order, best first.
    """
    texts = scores["text"].unique(maintain_order=True).to_list()
    order = image_order(scores, reference)
    controls = set(scores.filter("control")["image"])
    return texts, [one for one in order if one not in controls], [one for one in order if one in controls]


def pair_by_ways(scores: pl.DataFrame, text: str, image: str) -> pl.DataFrame:
    """Return what every way gives for one pair, the best first.

    Returns:
        One row per way: model, value (test R@10, mean of both directions and over seeds, 0 to 1), low and
        high (the lowest and the highest seed), text_to_image and image_to_text (its two parts), seeds.
    """
    own = scores.filter(split="test", text=text, image=image).group_by("model", maintain_order=True)
    found = own.agg(
        value=_BOTH.mean(), low=_BOTH.min(), high=_BOTH.max(),
        text_to_image=pl.col(f"t2i_{MAIN}").mean(), image_to_text=pl.col(f"i2t_{MAIN}").mean(),
        seeds=pl.col("seed").drop_nulls().n_unique(),
    )  # fmt: skip
    return found.sort("value", descending=True, maintain_order=True)


def chosen_texts(scores: pl.DataFrame) -> pl.DataFrame:
    """Return for each way, seed and image encoder the best text encoder's R@10, chosen on valid.

    Text encoders that tie on valid count with the mean of their test values. Controls are left out.

    Returns:
        One row per way, seed and image encoder: model, seed, image, image_width, image_parameters, and R@10
        on valid and on test.
    """
    keys = ["model", "seed", "image", "image_width", "image_parameters", "text"]
    found = scores.filter(~pl.col("control")).with_columns(value=_BOTH)
    sides = [
        found.filter(split=split).select(*keys, pl.col("value").alias(split)) for split in ("valid", "test")
    ]
    both = sides[0].join(sides[1], on=keys, nulls_equal=True, maintain_order="left")
    best = pl.col("valid").max().over("model", "seed", "image")
    return (
        both.filter(pl.col("valid") == best)
        .group_by(keys[:-1], maintain_order=True)
        .agg(pl.col("valid").first(), pl.col("test").mean())
    )


def _over_seeds(rows: list[dict[str, Any]], keys: list[str]) -> pl.DataFrame:
    """Average over seeds; low and high are the lowest and the highest seed."""
    value = pl.col("value")
    return (
        pl.DataFrame(rows, infer_schema_length=None)
        .group_by(keys, maintain_order=True)
        .agg(value.mean(), value.min().alias("low"), value.max().alias("high"))
    )


def scale_curve(scores: pl.DataFrame) -> pl.DataFrame:
    """Return the test R@10 of the pair a way would choose among N image encoders, for every N.

    The pair is chosen on valid among all text encoders and N image encoders; the value is the expectation
    over all subsets of that size.

    Returns:
        One row per way and N: model, size, value (mean over seeds), low and high (over seeds).
    """
    rows = []
    for (model, _), own in chosen_texts(scores).group_by("model", "seed", maintain_order=True):
        valid, test = own["valid"].to_numpy(), own["test"].to_numpy()
        for size in range(1, len(own) + 1):
            rows.append({"model": model, "size": size, "value": expected_best(valid, test, size)})
    return _over_seeds(rows, ["model", "size"])


def _label(value: int | None, edges: tuple[int, ...], unit: str, scale: int = 1) -> str:
    """Name the group that a number falls into."""
    if value is None:
        return f"{unit} unknown"
    if value == 0:
        return f"no {unit}"
    shown = [f"{edge // scale:,}{' M' if scale > 1 else ''}" for edge in edges]
    place = sum(value > edge for edge in edges)
    if place == len(edges):
        return f"above {shown[-1]} {unit}"
    if place == 0 or edges[place - 1] == 0:
        return f"up to {shown[place]} {unit}"
    above = shown[place - 1] if scale > 1 else f"{edges[place - 1] + 1:,}"
    return f"{above} to {shown[place]} {unit}"


def _middle(sizes: list[int]) -> int:
    """Return the size, not the largest, that cuts a sorted list into the most equal halves."""
    below = {size: place + 1 for place, size in enumerate(sizes) if size < sizes[-1]}
    return min(below, key=lambda size: abs(2 * below[size] - len(sizes)))


def encoder_groups(images: pl.DataFrame) -> dict[str, list[str]]:
    """Group image encoders by feature width and by parameters.

    Edges are fixed, for parameters the poster's among them. Where all encoders fall into one group, they are
    cut into halves as equal as ties allow; where all are alike, there is no such group.

    Args:
        images: one row per encoder with image, image_width and image_parameters.
    """
    found: dict[str, list[str]] = {}
    for column, edges, unit, scale in (
        ("image_width", _WIDTHS, "numbers wide", 1),
        ("image_parameters", _PARAMETERS, "parameters", 1_000_000),
    ):
        rows = images.sort(column, "image", nulls_last=True).to_dicts()
        sizes = [row[column] for row in rows]
        if (
            len({_label(size, edges, unit, scale) for size in sizes}) == 1
            and sizes[0]
            and sizes[0] < sizes[-1]
        ):
            edges, scale = (_middle(sizes),), 1
        own: dict[str, list[str]] = {}
        for row in rows:
            own.setdefault(_label(row[column], edges, unit, scale), []).append(row["image"])
        if len(own) > 1:
            found |= own
    return found


def best_of_groups(scores: pl.DataFrame) -> pl.DataFrame:
    """Return the test R@10 of the pair a way chooses on valid within each group of image encoders.

    Returns:
        One row per way and group: model, group, encoders, value (mean over seeds), low and high (over seeds).
    """
    chosen = chosen_texts(scores)
    groups = encoder_groups(chosen.select("image", "image_width", "image_parameters").unique())
    rows = []
    for (model, _), own in chosen.group_by("model", "seed", maintain_order=True):
        for group, members in groups.items():
            part = own.filter(pl.col("image").is_in(members))
            if part.height:
                value = expected_best(part["valid"].to_numpy(), part["test"].to_numpy(), part.height)
                rows.append({"model": model, "group": group, "encoders": part.height, "value": value})
    if not rows:
        schema = {"model": pl.String, "group": pl.String, "encoders": pl.Int64}
        return pl.DataFrame(schema={**schema, **dict.fromkeys(("value", "low", "high"), pl.Float64)})
    return _over_seeds(rows, ["model", "group", "encoders"])


def metric_row(metrics: pl.DataFrame, model: str, metric: str) -> dict[str, Any] | None:
    """Return a way's mean over seeds on test, over all pairs or, if it misses some, over one text encoder's.

    Args:
        metrics: of a run.
        model: the way.
        metric: which metric.

    Returns:
        The row; its group is "all" or "text=NAME". None if there is none.
    """
    rows = metrics.filter(pl.col("seed").is_null(), split="test", model=model, metric=metric)
    for own in (rows.filter(group="all"), rows.filter(pl.col("group").str.starts_with("text="))):
        if own.height:
            return own.row(0, named=True)
    return None


def cost_of_way(metrics: pl.DataFrame, model: str, metric: str) -> float | None:
    """Return flops, seconds or parameters of a way, of the whole or per pair; None if it has none."""
    rows = metrics.filter(pl.col("seed").is_null(), split="test", group="cost", model=model, metric=metric)
    return rows["value"].item() if rows.height else None
