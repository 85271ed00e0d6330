"""Accuracy by group of a run and of one's own pictures, against hand counts."""

import polars as pl
import pytest
import torch

from workbench.classifier import Classifier, HyperCLIPModel
from workbench.datasets.class_sets import ClassSet, Questions
from workbench.datasets.images import ImageTable
from workbench.errors import DataError
from workbench.groups import (
    SMALL,
    answers,
    fair_columns,
    group_rows,
    group_table,
    measure_groups,
    random_gaps,
    worst_table,
)
from workbench.runs import Run

COUNTS = {"Asia": 40, "Europe": 30, "Africa": 5}
TOP1 = {
    "siglip": {"Asia": 0.6, "Europe": 0.5, "Africa": 0.2},
    "ours": {"Asia": 0.7, "Europe": 0.8, "Africa": 0.1},
}


def row(model, group, metric, value, count):
    return {
        "split": "test", "model": model, "group": group, "metric": metric, "value": value, "low": value - 0.1,
        "high": value + 0.1, "count": count, "seed": None,
    }  # fmt: skip


def measured():
    rows = []
    for model, values in TOP1.items():
        for group, value in values.items():
            rows.append(row(model, f"region={group}", "top1", value, COUNTS[group]))
            if model == "ours":
                difference = value - TOP1["siglip"][group]
                rows.append(row(model, f"region={group}", "top1_minus_siglip", difference, COUNTS[group]))
        worst = min(values["Asia"], values["Europe"])
        rows.append(row(model, "by=region", "worst_group_top1", worst, 30))
        rows.append(row(model, "by=region", "gap_top1", abs(values["Asia"] - values["Europe"]), 30))
    rows.append(row("ours", "by=region", "worst_group_top1_minus_siglip", 0.2, 30))
    rows.append(row("chance", "by=region", "worst_group_top1", 0.5, 30))
    return pl.DataFrame(rows)


@pytest.fixture
def run(tmp_path):
    """A run whose metrics and answers are written down here."""
    made = Run(tmp_path / "by-hand")
    made.__dict__["recipe"] = {
        "reference": "siglip", "smallest_group": 30, "seeds": [0],
        "models": [{"name": "siglip", "kind": "siglip"}, {"name": "ours", "kind": "hyper"},
                   {"name": "chance", "kind": "chance"}],
    }  # fmt: skip
    made.__dict__["metrics"] = measured()
    places = [region for region, count in COUNTS.items() for _ in range(count)]
    images = range(len(places))
    # "siglip" is right everywhere, "ours" in Asia only; and both answer a side report wrong.
    made.__dict__["scores"] = pl.DataFrame(
        [
            {"split": "test", "set": one, "image": image, "model": model, "seed": 0, "label": 0,
             "predicted": 0 if right else 1, "rank": 1 if right else 2, "region": places[image]}
            for one in ("main", "side")
            for model in ("siglip", "ours")
            for image in images
            for right in [one == "main" and (model == "siglip" or places[image] == "Asia")]
        ]
    )  # fmt: skip
    return made


@pytest.fixture
def asked():
    """Two class sets over the same images, one a side report."""
    count = sum(COUNTS.values())
    about = {"templates": ("{}",), "rows": torch.arange(count), "label": torch.zeros(count, dtype=torch.long)}
    sets = (
        ClassSet("main", ["cat", "dog"], **about),
        ClassSet("side", ["kitten", "puppy"], side=True, **about),
    )
    return Questions(torch.zeros(count, 3, 4, 4, dtype=torch.uint8), pl.DataFrame({"x": [0] * count}), sets)


def test_group_columns_are_what_the_answers_carry_besides(run):
    assert fair_columns(run) == ["region"]


def test_every_group_stays_and_small_ones_are_not_judged(run):
    rows = group_rows(run, "region")
    assert rows.filter(model="ours")["group"].to_list() == ["Asia", "Europe", "Africa"]
    assert rows.filter(model="ours")["judged"].to_list() == [True, True, False]
    assert rows.filter(model="ours")["difference"].to_list() == pytest.approx([0.1, 0.3, -0.1])
    assert rows.filter(model="siglip")["difference"].to_list() == [None] * 3


def test_a_column_without_groups_is_refused_with_those_there_are(run):
    with pytest.raises(DataError, match=r"no groups by 'income'; its group columns: region"):
        group_rows(run, "income")


def test_the_table_carries_counts_and_marks(run):
    table = group_table(run, "region")
    assert table.columns == ["group", "images", "judged", "model", "top-1 (95 % interval)", "minus siglip"]
    assert ["Africa", 5, SMALL, "ours", "0.100 (0.000 to 0.200)", "-0.100 (-0.200 to +0.000)"] in table.rows
    assert ["Asia", 40, "yes", "siglip", "0.600 (0.500 to 0.700)", "-"] in table.rows


def test_the_worst_group_is_never_a_small_one(run):
    rows = {line[0]: line[1:] for line in worst_table(run, "region").rows}
    assert set(rows) == {"siglip", "ours"}  # a guess has no groups to be worst in
    assert rows["siglip"][:2] == ["Europe", "0.500 (0.400 to 0.600)"]
    assert rows["ours"][:3] == ["Asia", "0.700 (0.600 to 0.800)", "+0.200 (+0.100 to +0.300)"]


def test_without_two_judged_groups_there_is_no_worst_one(run):
    run.__dict__["metrics"] = measured().filter(pl.col("group") != "by=region")
    assert worst_table(run, "region").rows == []


def test_a_gap_stands_beside_those_of_random_groups(run, asked):
    found = random_gaps(run, asked, "region", draws=200)
    siglip, ours = found.to_dicts()
    assert (siglip["model"], siglip["gap"], siglip["random"]) == ("siglip", 0, 0)
    assert ours["gap"] == 1  # Asia all right, Europe all wrong; the side report is left out
    assert 0 < ours["random"] < ours["random_high"] < 0.5
    assert random_gaps(run, asked, "region", draws=200).equals(found)


def test_random_groups_need_two_that_are_judged(run, asked):
    run.recipe["smallest_group"] = 35
    assert random_gaps(run, asked, "region").height == 0


def test_answers_are_given_in_words(run, asked):
    found = answers(run, asked)
    assert found.height == 4 * sum(COUNTS.values())
    first = found.filter(model="ours", set="main").row(0, named=True)
    assert (first["truth"], first["said"], first["right"], first["side"]) == ("cat", "cat", True, False)
    last = found.filter(model="ours", set="side").row(-1, named=True)
    assert (last["truth"], last["said"], last["right"], last["region"]) == (
        "kitten",
        "puppy",
        False,
        "Africa",
    )
    assert found["side"].sum() == 2 * sum(COUNTS.values())


class Known(HyperCLIPModel):
    """A model that reads the class from a picture's first pixel, and is wrong about some."""

    def __init__(self, wrong: tuple[int, ...]) -> None:
        self.wrong = wrong

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def adapt(self, class_names, templates=()):
        self.told = class_names
        return Classifier(self, class_names, torch.eye(len(class_names)), None)

    def embed(self, pixels, weights, rows=None):
        found = torch.eye(len(self.told))[pixels[:, 0, 0, 0].long()]
        for place in self.wrong:
            found[place] = found[place].roll(1)
        return found


@pytest.fixture
def pictures():
    """Six pictures of cats and rain coats in two regions, and one whose label is blank."""
    label = ["cat", "rain_coat", "cat", "cat", "rain_coat", "cat", None]
    pixels = torch.zeros(7, 3, 4, 4, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.tensor([0, 1, 0, 0, 1, 0, 0])
    region = ["north", "north", "north", "south", "south", "south", "south"]
    return ImageTable(pixels, pl.DataFrame({"label": label, "region": region}))


def test_own_pictures_are_measured_by_group(pictures):
    models = {"siglip": Known(()), "ours": Known((0, 3, 4))}
    found = measure_groups(models, pictures, "region", smallest=2, resamples=50)
    value = {(one["model"], one["group"], one["metric"]): one["value"] for one in found.to_dicts()}
    assert value["siglip", "region=north", "top1"] == 1
    assert value["ours", "region=north", "top1"] == pytest.approx(2 / 3)
    assert value["ours", "region=south", "top1"] == pytest.approx(1 / 3)
    assert value["ours", "by=region", "worst_group_top1"] == pytest.approx(1 / 3)
    assert value["ours", "by=region", "gap_top1"] == pytest.approx(1 / 3)
    assert value["ours", "region=south", "top1_minus_siglip"] == pytest.approx(-2 / 3)
    counts = dict(found.select("group", "count").iter_rows())
    assert counts == {"region=north": 3, "region=south": 3, "by=region": 3}
    assert models["ours"].told == ["cat", "rain coat"]


def test_small_groups_of_own_pictures_are_measured_but_never_the_worst(pictures):
    found = measure_groups({"siglip": Known(())}, pictures, "region", smallest=4, resamples=50)
    assert sorted(set(found["group"])) == ["region=north", "region=south"]


def test_top_five_of_own_pictures(pictures):
    found = measure_groups({"siglip": Known((0, 1, 2))}, pictures, "region", top=5, smallest=2, resamples=50)
    assert set(found["metric"]) == {"top5", "worst_group_top5", "gap_top5"}
    assert (
        found.filter(group="region=north", metric="top5")["value"].item() == 1
    )  # two classes: always in five


def test_a_column_that_own_pictures_lack_is_refused(pictures):
    with pytest.raises(DataError, match="no group column 'income'; there are: label, region"):
        measure_groups({"siglip": Known(())}, pictures, "income")
    with pytest.raises(DataError, match="no model to measure"):
        measure_groups({}, pictures, "region")
