"""Figures of the dashboards on a phone: no error in the console, and no label stands on another."""

import json
from pathlib import Path

import numpy as np
import plotly
import polars as pl
import pytest

from tests.browsing import IN_A_BROWSER
from tests.test_figures_zoo import frame, score
from workbench.figures_pairs import cosines_figure, quadrants_figure, separations_figure, words_figure
from workbench.figures_weights import distances_figure, tree_figure
from workbench.figures_zoo import agreement_figure, pair_matrix_figure, scale_figure
from workbench.pair_changes import known_conditions, with_changes
from workbench.weight_distances import MEASURES, scale_of_angles

pytestmark = IN_A_BROWSER
PHONE = 350  # pixels that a figure has on a screen of 390
NAMES = [f"The {name} of it." for name in ("surroundings", "building", "price", "speed", "taste")]
KINDS = {
    "ape": "ape",
    "direct": "direct",
    "made": "hyper_align",
    "solved": "cca",
    "few": "search",
    "one": "hub",
}
# Labels of axes and panels and titles that meet by more than a hair; points' own names may.
MEETING = """() => {
  const parts = ['g[class$=tick]:not([class*=cb]) text', 'text[class$=title]:not([class*=cb])',
    '.annotation-text']
  const boxes = parts.flatMap(part => [...document.querySelectorAll('.js-plotly-plot ' + part)])
    .filter(part => part.textContent.trim())
    .map(part => [part.textContent, part.getBoundingClientRect()])
  const met = []
  boxes.forEach(([one, a], place) => boxes.slice(place + 1).forEach(([other, b]) => {
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left)
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top)
    if (wide > 4 && high > 4) met.push(`${one} | ${other}`)
  }))
  boxes.forEach(([one, a]) => { if (a.right > innerWidth + 1 || a.left < -1) met.push(`${one} is cut`) })
  return [boxes.length, met]
}"""
PLOT = "one => Plotly.newPlot('one', one.data, one.layout, {responsive: true}).then(() => 0)"


@pytest.fixture(scope="module")
def drawn(browser):
    """Draw a figure as on a phone; return the number of labels, which meet and what went wrong."""
    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    page = browser.new_page(viewport={"width": PHONE, "height": 800})
    page.set_content("<body style='margin:0'><div id='one'></div></body>")
    page.add_script_tag(path=str(script))
    said = []
    page.on("console", lambda line: said.append(line.text) if line.type == "error" else None)

    def draw(figure):
        said.clear()
        page.evaluate(PLOT, json.loads(figure.to_json()))
        page.wait_for_timeout(200)
        return *page.evaluate(MEETING), list(said)

    return draw


def scores():
    images = ["random_convolutions", "colour_histogram", "visual_words", "hog", "lbp", "gabor", "pixels_pca"]
    rows = [
        score(model, image, 0.1 * place + 0.02 * len(model), text, split, image_width=100 * place + 10)
        for model in KINDS
        for split in ("valid", "test")
        for text in ("all-MiniLM-L6-v2", "lsa_words")
        for place, image in enumerate(images)
    ]
    return frame(rows)


def agreements():
    rows = [
        {"model": model, "metric": "rank_agreement", "value": 0.5, "low": 0.4, "high": 0.6, "group": "all",
         "count": 4, "seed": None, "split": "test"} for model in KINDS
    ]  # fmt: skip
    return frame(rows)


def changed():
    plain, conditioned = np.linspace(0.1, 0.6, 40), np.linspace(0.9, -0.6, 40)
    pairs = pl.DataFrame({"row": range(40), "plain": plain, "conditioned": conditioned, "gold": plain})
    return with_changes(pairs)


def parted():
    conditions = known_conditions()["condition"].to_list()
    change = np.linspace(-0.9, 0.5, len(conditions))
    columns = {
        "condition": conditions,
        "plain": 0.4,
        "cosine": change + 0.4,
        "change": change,
        "less_alike": 0.5,
    }
    return pl.DataFrame(columns)


def distances():
    places = np.arange(len(NAMES), dtype=float)
    return np.abs(places[:, None] - places)


MODELS = [{"name": name, "kind": kind} for name, kind in KINDS.items()]
FIGURES = {
    "pairs of a zoo": lambda: pair_matrix_figure(scores(), "made", "ape"),
    "scale of a zoo": lambda: scale_figure(scores(), MODELS),
    "agreement of ways": lambda: agreement_figure(scores(), agreements(), MODELS, "ape"),
    "distances": lambda: distances_figure(NAMES, distances(), MEASURES["frobenius"].scale),
    "tree": lambda: tree_figure(NAMES, distances(), 1, MEASURES["cosine"].scale),
    "tree of angles": lambda: tree_figure(NAMES, distances(), 1, scale_of_angles(384, 16)),
    "quadrants": lambda: quadrants_figure(changed(), "The colour."),
    "what parts a pair": lambda: separations_figure(parted(), "The size."),
    "cosines": lambda: cosines_figure(["a"] * 14, np.eye(14).tolist(), "plain encoder"),
    "words": lambda: words_figure(["unbelievably", "cold", "."], [0.1, -0.2, 0.0], "Words of the condition",
                                  "sum -0.100, completeness error 0.01%", 0.2),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_on_a_phone_no_label_stands_on_another_and_nothing_fails(drawn, name):
    labels, met, said = drawn(FIGURES[name]())
    assert labels > 4
    assert said == []
    assert met == []


def test_labels_that_meet_or_fail_on_a_phone_are_noticed(drawn):
    crowded = FIGURES["distances"]().update_xaxes(
        showticklabels=True, tickvals=[*range(len(NAMES))], ticktext=NAMES, tickangle=0
    )  # fmt: skip
    assert "The price of it. | The speed of it." in drawn(crowded)[1]
    # Names of two panels that plotly turns as it likes: it then puts a title at minus infinity.
    turned = FIGURES["pairs of a zoo"]().update_xaxes(tickangle=None)
    assert "-Infinity" in drawn(turned)[2][0]
