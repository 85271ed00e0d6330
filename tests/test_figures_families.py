"""Pictures of families: what is drawn where, upright, and not stretched."""

import polars as pl

from workbench.families.comparison import CURVES
from workbench.figures_families import pictures_figure


def test_pictures_stand_upright_below_the_true_ones_and_keep_their_proportions():
    cells = {"true": [1.0, 0.0, 0.0, 0.0], "own": [0.0, 0.0, 1.0, 0.0]}  # 2 x 2, row by row from the top
    rows = [
        {"model": "own", "seed": seed, "curve": name, "x": float(place), "y": value + seed}
        for seed in (0, 1)
        for number in range(2)
        for name, kind in ((f"shape_{number}_true", "true"), (f"shape_{number}", "own"))
        for place, value in enumerate(cells[kind])
    ]
    figure = pictures_figure(pl.DataFrame(rows, schema=CURVES), ["own", "not drawn"], "Shapes")
    assert len(figure.data) == 4  # two pictures of one model, and what they should be
    # A heat map's first row is its lowest.
    assert [trace.z.tolist() for trace in figure.data] == [[[0, 0], [1, 0]]] * 2 + [[[1, 0], [0, 0]]] * 2
    assert [note.text for note in figure.layout.annotations] == ["true", "own"]
    axes = [figure.layout[key] for key in figure.layout if key.startswith("yaxis")]
    assert sorted(axis.scaleanchor for axis in axes) == ["x", "x2", "x3", "x4"]
    assert all(axis.scaleanchor == axis.anchor for axis in axes)
