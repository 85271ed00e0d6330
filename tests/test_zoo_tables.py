"""Tables of a zoo of encoders: every number worked out by hand, and ways that miss pairs are not lost."""

from pathlib import Path

import polars as pl
import pytest

from workbench.runs import Run
from workbench.tables import flops_text
from workbench.zoo_scores import (
    best_of_groups,
    chosen_texts,
    cost_of_way,
    encoder_groups,
    image_order,
    metric_row,
    pair_means,
    scale_curve,
)
from workbench.zoo_tables import (
    agreement_table,
    best_ways,
    encoder_table,
    scale_table,
    ways_table,
    zoo_findings,
)

MODELS = [
    {"name": "chance", "kind": "chance", "against": None},
    {"name": "grid", "kind": "ape", "against": None},
    {"name": "grid_large", "kind": "ape", "against": None},
    {"name": "together", "kind": "direct", "against": None},
    {"name": "made", "kind": "hyper_align", "against": None},
    {"name": "solved", "kind": "cca", "against": None},
]


def score(model, image, value, split="test", text="words", seed=0, **more):
    """One row of a run's scores whose R@10, mean of both directions, is ``value``."""
    about = {"image_width": 128, "image_parameters": 0, "control": False, **more}
    sides = {"t2i_recall_at_10": value - 0.05, "i2t_recall_at_10": value + 0.05}
    return {"model": model, "seed": seed, "split": split, "text": text, "image": image, **about, **sides}


def both(model, image, valid, test, **more):
    return [score(model, image, valid, "valid", **more), score(model, image, test, **more)]


def row(model, metric, value, group="all", count=100, seed=None):
    return {
        "model": model, "metric": metric, "value": value, "low": value - 0.01, "high": value + 0.02,
        "group": group, "count": count, "seed": seed, "split": "test",
    }  # fmt: skip


def run_of(scores, metrics, models=MODELS, reference="grid"):
    run = Run(Path("nowhere"))
    run.__dict__["scores"] = pl.DataFrame(scores, infer_schema_length=None)
    run.__dict__["metrics"] = pl.DataFrame(metrics, infer_schema_length=None)
    run.__dict__["recipe"] = {"models": models, "reference": reference, "paper": "hyper_align",
                              "published": [], "bars": []}  # fmt: skip
    run.__dict__["provenance"] = {"seeds": [0, 1]}
    return run


@pytest.fixture
def run():
    scores = []
    for model, values in {
        "grid": (0.4, 0.6), "grid_large": (0.5, 0.7), "together": (0.4, 0.6), "made": (0.3, 0.2),
        "solved": (0.6, 0.5), "chance": (0.1, 0.1),
    }.items():  # fmt: skip
        for image, value in zip("ab", values, strict=True):
            seed = None if model == "chance" else 0
            scores += both(model, image, value, value, seed=seed)
            if model != "grid_large":
                scores += both(model, image, value - 0.1, value - 0.1, text="letters", seed=seed)
    scores += both("grid", "a, duplicate", 0.4, 0.4, control=True)
    metrics = []
    for model, value, flops in (
        ("chance", 0.1, None), ("grid", 0.5, 8e9), ("together", 0.5, 2e9), ("made", 0.25, 4e9),
        ("solved", 0.55, 5e8),
    ):  # fmt: skip
        metrics.append(row(model, "recall_at_10", value))
        if model in ("grid", "made"):  # 0.2 and 0.3 apart
            apart = 0.05 if model == "made" else 0.0
            metrics += [
                row(model, "recall_at_10", value + (0.5 - seed) * 2 * apart, seed=seed) for seed in (0, 1)
            ]
        metrics.append(row(model, "regret", 0.0, count=4))
        metrics += [row(model, "ndcg_at_5", 0.9, count=4), row(model, "chosen_recall_at_10", value, count=4)]
        if flops:
            metrics.append(row(model, "rank_agreement", value + 0.3, count=4))
            metrics += [row(model, "flops", 4 * flops, "cost"), row(model, "flops_per_pair", flops, "cost")]
            metrics += [row(model, "seconds", 12.34, "cost"), row(model, "parameters", 123456.0, "cost")]
    for model in ("made", "together", "solved"):
        metrics.append(row(model, "recall_at_10_minus_grid", -0.25 if model == "made" else 0.05))
    metrics.append(row("grid_large", "recall_at_10", 0.6, "text=words"))
    metrics += [
        row("grid_large", "flops", 6.4e10, "cost"),
        row("grid_large", "flops_per_pair", 3.2e10, "cost"),
    ]
    return run_of(scores, metrics)


# --- scores -------------------------------------------------------------------------------------------------


def test_a_pairs_value_is_the_mean_of_both_directions_and_of_all_seeds():
    frame = pl.DataFrame(
        [score("m", "a", 0.2, seed=0), score("m", "a", 0.4, seed=1), score("m", "a", 0.9, "valid")]
    )
    assert pair_means(frame)["value"].to_list() == [pytest.approx(0.3)]


def test_encoders_stand_in_the_references_order_controls_last():
    rows = [score("grid", "low", 0.1), score("grid", "high", 0.5), score("grid", "copy", 0.9, control=True)]
    rows += [score("other", "low", 0.8), score("other", "high", 0.0)]
    assert image_order(pl.DataFrame(rows), "grid") == ["high", "low", "copy"]


def test_the_text_encoder_is_chosen_on_valid_and_ties_count_alike():
    rows = both("m", "a", 0.2, 0.9) + both("m", "a", 0.4, 0.1, text="letters")
    rows += both("m", "b", 0.3, 0.2) + both("m", "b", 0.3, 0.6, text="letters")
    rows += both("m", "copy", 0.9, 0.9, control=True)
    found = chosen_texts(pl.DataFrame(rows))
    assert found["image"].to_list() == ["a", "b"]
    assert found["test"].to_list() == pytest.approx([0.1, 0.4])  # 0.4: the mean of 0.2 and 0.6


def test_the_expected_best_of_n_encoders_is_chosen_on_valid_and_scored_on_test():
    rows = both("m", "a", 0.1, 0.5) + both("m", "b", 0.2, 0.1) + both("m", "c", 0.3, 0.3)
    curve = scale_curve(pl.DataFrame(rows))
    assert curve["size"].to_list() == [1, 2, 3]
    # one: (0.5 + 0.1 + 0.3) / 3; two: {a, b} -> b, {a, c} -> c, {b, c} -> c; three: c
    assert curve["value"].to_list() == pytest.approx([0.3, (0.1 + 0.3 + 0.3) / 3, 0.3])


def test_the_scale_of_several_seeds_is_their_mean_with_the_lowest_and_highest():
    rows = both("m", "a", 0.1, 0.2, seed=0) + both("m", "a", 0.1, 0.6, seed=1)
    found = scale_curve(pl.DataFrame(rows)).row(0, named=True)
    assert (found["value"], found["low"], found["high"]) == pytest.approx((0.4, 0.2, 0.6))


def test_a_guess_without_a_seed_has_a_curve_too():
    rows = both("chance", "a", 0.1, 0.1, seed=None) + both("chance", "b", 0.1, 0.1, seed=None)
    assert scale_curve(pl.DataFrame(rows))["value"].to_list() == pytest.approx([0.1, 0.1])


def encoders(*sizes):
    names = ("image", "image_width", "image_parameters")
    return pl.DataFrame(
        [(f"e{place}", *size) for place, size in enumerate(sizes)], schema=names, orient="row"
    )


def test_encoders_are_grouped_by_fixed_edges():
    found = encoder_groups(encoders((64, 0), (65, 500_000), (1024, 50_000_000), (2048, 200_000_000)))
    assert found == {
        "up to 64 numbers wide": ["e0"],
        "65 to 512 numbers wide": ["e1"],
        "513 to 1,024 numbers wide": ["e2"],
        "above 1,024 numbers wide": ["e3"],
        "no parameters": ["e0"],
        "up to 1 M parameters": ["e1"],
        "30 M to 120 M parameters": ["e2"],
        "above 120 M parameters": ["e3"],
    }


def test_encoders_of_one_group_are_cut_into_halves_as_equal_as_ties_allow():
    found = encoder_groups(encoders((128, 0), (256, 0), (256, 0), (300, 0), (300, 0)))
    assert found == {"up to 256 numbers wide": ["e0", "e1", "e2"], "above 256 numbers wide": ["e3", "e4"]}


def test_a_division_that_divides_nothing_is_left_out():
    assert encoder_groups(encoders((128, 0), (128, 0))) == {}
    unknown = encoder_groups(encoders((128, None), (128, 5)))
    assert unknown == {"up to 1 M parameters": ["e1"], "parameters unknown": ["e0"]}


def test_the_best_of_a_group_is_chosen_on_valid_within_it():
    rows = both("m", "a", 0.1, 0.5, image_width=32) + both("m", "b", 0.9, 0.2, image_width=128)
    rows += both("m", "c", 0.3, 0.8, image_width=128)
    found = best_of_groups(pl.DataFrame(rows))
    assert found.select("group", "encoders").rows() == [
        ("up to 64 numbers wide", 1),
        ("65 to 512 numbers wide", 2),
    ]
    assert found["value"].to_list() == pytest.approx([0.5, 0.2])


def test_without_groups_the_frame_is_empty_and_has_its_columns():
    found = best_of_groups(pl.DataFrame(both("m", "a", 0.1, 0.5)))
    assert found.is_empty()
    assert found.columns == ["model", "group", "encoders", "value", "low", "high"]


def test_a_way_that_misses_pairs_is_told_by_one_text_encoders(run):
    assert metric_row(run.metrics, "grid", "recall_at_10")["group"] == "all"
    assert metric_row(run.metrics, "grid_large", "recall_at_10")["group"] == "text=words"
    assert metric_row(run.metrics, "grid_large", "regret") is None
    assert cost_of_way(run.metrics, "chance", "flops") is None


# --- tables -------------------------------------------------------------------------------------------------


def cells(table):
    return {line[0]: dict(zip(table.columns, line, strict=True)) for line in table.rows}


def test_ways_are_listed_best_first_with_what_they_save_per_pair(run):
    table = ways_table(run)
    assert [line[0] for line in table.rows] == [
        "solved", "grid", "together", "made", "chance", "grid_large (words only)",
    ]  # fmt: skip
    found = cells(table)
    assert found["solved"]["R@10 (95 % interval)"] == "0.550 (0.540 to 0.570)"
    assert found["solved"]["operations"] == "2 GFLOP"
    assert found["solved"]["x cheaper than grid"] == "16"  # 8e9 / 5e8
    assert found["made"]["x cheaper than grid"] == "2.00"
    assert found["made"]["x cheaper than grid_large"] == "8.00"  # 3.2e10 / 4e9
    assert found["grid_large (words only)"]["x cheaper than grid"] == "0.25"
    assert found["together"]["seconds"] == "12.3"
    assert found["together"]["trained parameters"] == "123,456"
    assert found["chance"]["operations"] == found["chance"]["rank agreement"] == "-"


def test_operations_are_printed_with_a_prefix():
    assert [flops_text(value) for value in (None, 12.0, 2.5e6, 1.234e9, 8.3e14)] == [
        "-", "12 FLOP", "2.5 MFLOP", "1.23 GFLOP", "830 TFLOP",
    ]  # fmt: skip


def test_agreement_is_listed_best_first_with_the_pair_each_seed_chose(run):
    table = agreement_table(run)
    assert [line[0] for line in table.rows] == ["solved", "grid", "together", "made", "chance"]
    found = cells(table)
    assert found["grid"]["rank agreement"] == "0.800 (0.790 to 0.820)"
    assert found["grid"]["chosen"] == "words -> b"  # 0.6, its control left out
    assert found["solved"]["chosen"] == "words -> a"
    assert found["chance"]["chosen"] == "-"
    assert found["made"]["pairs"] == 4


def test_the_scale_table_has_one_and_all_encoders_and_the_groups(run):
    table = scale_table(run)
    assert table.columns == ["way", "N = 1", "N = 2"]
    # text "words" is better everywhere; together's encoders have 0.4 and 0.6
    assert cells(table)["together"] == {"way": "together", "N = 1": "0.500", "N = 2": "0.600"}
    assert cells(table)["grid_large (words only)"]["N = 2"] == "0.700"


def test_encoders_are_listed_with_the_best_way_that_has_all_pairs(run):
    table = encoder_table(run)
    assert table.columns[-2:] == ["R@10 by solved, mean over texts", "R@10 by grid, mean over texts"]
    assert table.rows == [
        ["b", "encoder", 128, "none", "0.450", "0.550"],
        ["a", "encoder", 128, "none", "0.550", "0.350"],
        ["a, duplicate", "control", 128, "none", "-", "0.400"],
    ]


def test_the_best_of_each_kind_has_all_pairs_and_is_not_the_grid(run):
    assert best_ways(run) == ["made", "together", "solved"]


def test_findings_name_what_is_saved_and_what_is_lost(run):
    lines = zoo_findings(run)
    assert lines[0] == (
        "made, the best of its kind (hyper_align), takes 0.50 of grid's operations a pair; R@10 minus grid: "
        "-0.250 (-0.260 to -0.230); by seed -0.200, -0.300."
    )
    assert lines[-1] == (
        "The ranking of the 4 pairs nearest to grid's is solved's: Spearman 0.850 (0.840 to 0.870)."
    )
    assert len(lines) == 4
