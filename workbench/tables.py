"""Runs -> tables and sentences: what was measured, beside bars, published numbers and baselines.

Shared by notebooks, reports and pages, so that one number is computed by one function.
"""

import statistics
from dataclasses import dataclass
from typing import Any

import polars as pl

from workbench.config import Bar
from workbench.runs import Run

SHOWN = (
    "top1",
    "top5",
    "mean_per_class",
    "worst_group_top1",
    "gap_top1",
    "spearman",
    "spearman_relabelled",
    "pearson",
    "auc",
    "pair_order",
    "mrr",
    "hits_at_1",
    "hits_at_3",
    "hits_at_10",
    "mr",
    "recall_at_10",
    "recall_at_1",
    "t2i_recall_at_10",
    "i2t_recall_at_10",
    "rank_agreement",
    "regret",
)
TIMED = ("hit_rate", "cache_mib", "cache_mib_768", "cache_mib_1024", "seconds_batch_1", "seconds_batch_128")
FLOORS = {  # kind of the model that sees one side only -> what it never sees
    "chance": "the image",
    "condition_only": "the sentences",
    "frequency": "the head",
}


@dataclass(frozen=True)
class Table:
    """A table of a report: column names and rows of ready text."""

    columns: list[str]
    rows: list[list[Any]]

    def _repr_markdown_(self) -> str:
        """Let a notebook show the table."""
        return self.markdown()

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown; cells cannot break out of it."""

        def cell(value: Any) -> str:
            text = value["text"] if isinstance(value, dict) else str(value)  # pages carry the links
            return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")

        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def main_metric(run: Run) -> str:
    """Return the metric a run is ranked by: the one it names or is held against, else the first it has."""
    if "metric" in run.recipe:
        return run.recipe["metric"]
    known = set(run.metrics.filter(split=last_split(run.metrics), group="all")["metric"])
    held = [item["metric"] for item in (*run.recipe["published"], *run.recipe["bars"])]
    order = (*held, "top1", "auc", "pair_order", "spearman", "mrr", "recall_at_10", "hit_rate")
    return next(name for name in order if name in known & {*SHOWN, *TIMED} - {"rank_agreement", "regret"})


def shown_metrics(run: Run) -> tuple[str, ...]:
    """Return the metrics of a run's main table; a family shows what it measures, in its order."""
    if "metric" not in run.recipe:
        return *SHOWN, *TIMED
    names = run.metrics.filter(~pl.col("metric").str.contains("_minus_"))["metric"]
    return tuple(dict.fromkeys([run.recipe["metric"], *names]))


def best_first(run: Run) -> bool:
    """Tell whether models are sorted from high to low."""
    return not run.recipe.get("lower_is_better", False)


def last_split(metrics: pl.DataFrame) -> str:
    """Return "test", or "valid" where the test labels are withheld; "all" if splits play no part."""
    return next(split for split in ("test", "valid", "all") if split in metrics["split"].unique())


def model_table(run: Run, group: str = "all", split: str | None = None) -> pl.DataFrame:
    """Return a run's main table: per model all metrics with interval, spread over seeds, and the difference.

    Args:
        run: a finished run.
        group: which rows, for example "condition_kind=unseen".
        split: "test" unless its labels are withheld.
    """
    metrics, split = run.metrics, split or last_split(run.metrics)
    main, reference = main_metric(run), run.recipe["reference"]
    part = metrics.filter(split=split, group=group)
    rows = []
    for model in run.recipe["models"]:
        own = part.filter(model=model["name"])
        means = {row["metric"]: row for row in own.filter(pl.col("seed").is_null()).to_dicts()}
        if not means:
            continue
        seeds = own.filter(pl.col("seed").is_not_null())
        row: dict[str, Any] = {"model": model["name"], "seeds": seeds["seed"].n_unique() or None}
        for name in shown_metrics(run):
            if name in means:
                row[name] = means[name]["value"]
        values = seeds.filter(metric=main)["value"].to_list()
        ranked = means.get(main, {"low": None, "high": None, "count": next(iter(means.values()))["count"]})
        row |= {"low": ranked["low"], "high": ranked["high"]}
        row["spread"] = statistics.stdev(values) if len(values) > 1 else None
        versus = means.get(f"{main}_minus_{reference}", {})
        row |= {"difference": versus.get("value"), "difference_low": versus.get("low")}
        row |= {"difference_high": versus.get("high"), "matched": model["against"]}
        versus = means.get(f"{main}_minus_{model['against']}", {})
        row |= {f"matched_{key}": versus.get(key) for key in ("value", "low", "high")}
        row["count"] = ranked["count"]
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def _number(value: float | None, sign: bool = False) -> str:
    """Print a score; a dash where there is none."""
    if value is not None and not sign and value >= 1000:  # a count among the metrics
        return f"{value:,.0f}"
    return "-" if value is None else f"{value:+.3f}" if sign else f"{value:.3f}"


def flops_text(value: float | int | None) -> str:
    """Print operations with an SI prefix; a dash where there are none."""
    if value is None:
        return "-"
    prefixes = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
    size, prefix = next((one for one in prefixes if value >= one[0]), (1, ""))
    return f"{value / size:.3g} {prefix}FLOP"


def with_interval(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    """Print a value with its interval; a dash where there is none. One seed has no interval over seeds."""
    return "-" if value is None else f"{value:{sign}.3f} ({_limits(low, high, sign) or 'no interval'})"


def _limits(low: float | None, high: float | None, sign: str) -> str:
    """Print an interval; empty if there is none."""
    none = low is None or high is None or low != low or high != high
    return "" if none else f"{low:{sign}.3f} to {high:{sign}.3f}"


def score_table(run: Run, group: str = "all") -> Table:
    """Print the main table of one group, best model first, with operations where a run counted them."""
    frame, main = model_table(run, group), main_metric(run)
    if frame.is_empty():
        return Table(["model"], [])
    scores = [name for name in shown_metrics(run) if name in frame.columns]
    counted = {card["model"]: card["operations"] for card in run.cards if "operations" in card}
    columns = [
        "model",
        *scores,
        *([f"kFLOP per {name}" for name in ("pair", "condition")] if counted else []),
        f"{main}: 95 % interval",
        "sd over seeds",
        f"minus {run.recipe['reference']}",
        "minus matched model",
    ]
    rows = []
    by = main if main in scores else scores[0]
    for row in frame.sort(by, descending=best_first(run), nulls_last=True).to_dicts():
        difference = with_interval(row["difference"], row["difference_low"], row["difference_high"], "+")
        matched = with_interval(row["matched_value"], row["matched_low"], row["matched_high"], "+")
        matched += f" {row['matched']}" if row["matched"] else ""
        interval = _limits(row["low"], row["high"], "") or "-"
        cells = [_number(row[name]) for name in scores]
        if counted:
            own = counted.get(row["model"], {})
            numbers = [own.get(f"per_{name}") for name in ("pair", "condition")]
            cells += ["-" if number is None else f"{number / 1e3:,.1f}" for number in numbers]
        rows.append(
            [row["model"], *cells, interval, _number(row["spread"]), difference, matched, row["count"]]
        )
    return Table([*columns, "rows"], rows)


def _found(run: Run, item: dict[str, Any]) -> dict[str, Any] | None:
    """Return the mean that a bar or a published number is held against."""
    rows = run.metrics.filter(
        pl.col("seed").is_null(),
        model=item["model"], metric=item["metric"], split=item["split"], group=item.get("group", "all"),
    ).to_dicts()  # fmt: skip
    return rows[0] if rows else None


def bar_table(run: Run) -> Table:
    """Hold the project's own bars against the run."""
    rows = []
    for bar in run.recipe["bars"]:
        found = _found(run, bar)
        value = "-" if found is None else with_interval(found["value"], found["low"], found["high"])
        limit = Bar(**bar)
        verdict = "not measured" if found is None else "met" if limit.met(found["value"]) else "missed"
        where = f"{limit.split}, {limit.group}"
        rows.append([limit.model, limit.metric, where, limit.text, value, verdict])
    return Table(["model", "metric", "split, group", "bar", "measured", "verdict"], rows)


def published_table(run: Run) -> Table:
    """Put reproduced beside published: difference, tolerance and verdict."""
    rows = []
    for item in run.recipe["published"]:
        found = _found(run, item)
        value = None if found is None else found["value"]
        difference = None if value is None else value - item["value"]
        if not item["comparable"]:
            verdict = "not comparable"
        elif difference is None:
            verdict = "not measured"
        else:
            verdict = "reproduced" if abs(difference) <= item["tolerance"] else "not reproduced"
        where = f"{item['table']}, {item['source']}"
        cells = [_number(item["value"]), _number(value), _number(difference, True), f"{item['tolerance']:g}"]
        rows.append(
            [item["model"], f"{item['split']} {item['metric']}", *cells, verdict, where, item["note"]]
        )
    return Table(
        ["model", "metric", "published", "ours", "difference", "tolerance", "verdict", "where", "note"], rows
    )


def _side(low: float, high: float) -> str:
    """Say on which side of zero an interval lies."""
    return "above" if low > 0 else "below" if high < 0 else "not distinguishable from"


def seed_differences(run: Run, model: str, other: str) -> list[float]:
    """Return the difference of two models in the main metric under each seed that both were trained under.

    A model without seeds of its own counts with its one value; empty if fewer than two seeds are left, and
    for families, whose intervals are over seeds already.
    """
    if "metric" in run.recipe:
        return []
    rows = run.metrics.filter(metric=main_metric(run), split=last_split(run.metrics), group="all")
    seeds, one, two = run.provenance["seeds"], {}, {}
    for name, values in ((model, one), (other, two)):
        values |= dict(
            rows.filter(pl.col("seed").is_not_null(), model=name).select("seed", "value").iter_rows()
        )
        if len(values) < 2:
            values |= dict.fromkeys(seeds, rows.filter(pl.col("seed").is_null(), model=name)["value"].first())
    apart = [one[seed] - two[seed] for seed in seeds if None not in (one.get(seed), two.get(seed))]
    return apart if len(apart) > 1 else []


def by_seed(apart: list[float]) -> str:
    """Say the differences under each seed after a mean; empty if there are none."""
    return f"; by seed {', '.join(f'{one:+.3f}' for one in apart)}" if apart else ""


def _beside(run: Run, model: str, other: str, found: list[float], about: str = "") -> str:
    """Say on which side of another model one lies, over rows and under each seed.

    Args:
        run: that holds both.
        model: the one.
        other: the other one.
        found: their difference, and the ends of its interval.
        about: said of the other one.
    """
    apart = seed_differences(run, model, other)
    split = found[1] * found[2] > 0 and any(one * found[0] <= 0 for one in apart)
    limits = ", on these rows but not under every seed" if split else ""
    return f"is {_side(*found[1:])} {other}{about}{limits}: {with_interval(*found, '+')}{by_seed(apart)}."


def findings(run: Run) -> list[str]:
    """Say in sentences what the numbers say: winner, generated weights against baseline, floor."""
    frame, main, reference = model_table(run), main_metric(run), run.recipe["reference"]
    kinds = {model["name"]: model for model in run.recipe["models"]}
    best = frame.sort(main, descending=best_first(run), nulls_last=True).to_dicts()[0]
    lines = [
        f"Best of {frame.height} models by {main}: {best['model']} with "
        f"{with_interval(best[main], best['low'], best['high'])}."
    ]
    of_paper = {
        name
        for name, settings in kinds.items()
        if settings["kind"] == "hyper"
        and settings.get("pooling", "sentence") == "sentence"
        and "role" not in settings
    }
    plain = [row for row in frame.to_dicts() if row["model"] in of_paper and row["difference"] is not None]
    if plain and reference in kinds:
        top = max(plain, key=lambda row: row[main])
        found = [top[key] for key in ("difference", "difference_low", "difference_high")]
        said = _beside(run, top["model"], reference, found)
        lines.append(f"The best head of the paper's own form, {top['model']}, {said}")
    matched = [f"matched_{key}" for key in ("value", "low", "high")]
    lines += [
        f"{row['model']} "
        + _beside(run, row["model"], row["matched"], [row[key] for key in matched], ", its matched model")
        for row in frame.to_dicts()
        if row["matched_value"] is not None
    ]
    for name, settings in kinds.items():
        if settings["kind"] in FLOORS:
            floor = next((row[main] for row in frame.to_dicts() if row["model"] == name), None)
            value = "undefined (it scores all rows alike)" if floor is None else f"{floor:.3f}"
            lines.append(
                f"The floor {name}, which never sees {FLOORS[settings['kind']]}, has {main} {value}."
            )
    missed = [
        f"{model}, {metric} ({where}): {verdict}{f' at {value}' * (value != '-')}, set at {limit}"
        for model, metric, where, limit, value, verdict in bar_table(run).rows
        if verdict != "met"
    ]
    if run.recipe["bars"]:
        lines.append(f"Bars not met: {'; '.join(missed)}." if missed else "Every bar of this recipe is met.")
    return lines


def adds(run: Run) -> bool:
    """Whether a run's cards say how large generated weights are beside those that they are added to."""
    return any("over_own" in (card.get("health") or {}) for card in run.cards)


def card_table(run: Run) -> Table:
    """Print what each trained model costs and whether its generator is sound, first seed."""
    rows, seen = [], set()
    counted = any("flops" in card for card in run.cards)
    swapped = any("swap_seconds" in card for card in run.cards)
    embedded, added = any("geometry" in card for card in run.cards), adds(run)
    for card in run.cards:
        if card["seed"] is None or card["model"] in seen:
            continue
        seen.add(card["model"])
        health, cost = card.get("health"), card.get("cost")
        generator = (
            [f"{cost['generator_parameters']:,}", f"{cost['generated_parameters']:,}"] if cost else ["-", "-"]
        )
        rank = f"{health['effective_rank']:.1f} of {health['conditions']}" if health else "-"
        beside = [_number((health or {}).get("over_own"))] if added else []
        alive = [rank, *beside, health["verdict"] if health else "-"]
        even = str(cost["break_even_conditions"]) if cost else "-"
        lie = card.get("geometry") or {}
        places = [_number(lie.get("alignment")), _number(lie.get("uniformity"))] if embedded else []
        rows.append(
            [
                card["model"],
                f"{card['parameters']:,}",
                f"{card['seconds']:.1f}",
                *([flops_text(card.get("flops"))] if counted else []),
                *([f"{1e3 * card['swap_seconds']:.3f}"] if swapped else []),
                card.get("peak_device_mib", card["peak_process_mib"]),
                *generator,
                even,
                *alive,
                *places,
            ]
        )
    # Without a device of its own, a model has the peak of the process, which all before it have raised.
    whose = "device" if any("peak_device_mib" in card for card in run.cards) else "process so far"
    columns = ["model", "trained parameters", "seconds", *(["operations"] if counted else [])]
    columns += ["milliseconds per swap"] if swapped else []
    columns.append(f"peak MiB, of the {whose}")
    columns += ["of the generator", "generated per condition"]
    columns += ["break-even conditions", "effective rank", *(["generated / own"] if added else [])]
    columns.append("generator")
    return Table([*columns, *(["alignment", "uniformity"] if embedded else [])], rows)


def robustness_table(found: pl.DataFrame) -> Table:
    """Print what :func:`workbench.robustness.measure_robustness` measured."""
    rows = [
        [
            row["variant"],
            row["example"],
            "-" if row["rows"] is None else f"{row['rows']:,}",
            *(_number(row[name]) for name in ("moved", "rank_kept", "pair_order")),
            row["verdict"],
        ]
        for row in found.to_dicts()
    ]
    columns = ["condition", "example", "rows", "mean change of the cosine", "rank correlation kept"]
    columns.append("pair order")
    return Table([*columns, "verdict"], rows)
