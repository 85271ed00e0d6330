"""Glyphs: made-up characters of three strokes, and episodes that ask which of five a written one is.

A kind of glyph is where its strokes begin and end. Every time it is written, the ends are moved a little and
the whole glyph is shifted, as by another hand. Held-out glyphs are of kinds that training never shows.

Shape letters: N glyphs, H and W pixels, U episodes, K classes, S examples of a class, Q questions of a class.

Source: ours, drawn from seeds; stands for sets of written characters such as Omniglot.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.families.fields import grid, to_segment

SIZE, STROKES = 14, 3  # of a glyph
JITTER, SHIFT, THICK = 0.2, 0.15, 0.1  # of a stroke's ends, of the whole glyph, of the ink; in half sides
GLYPHS, HELD_OUT = 500, 100  # kinds of glyphs, and how many of them only test episodes show
CLASSES, QUESTIONS = 5, 5  # of an episode; questions of each class


def draw_strokes() -> Float[Tensor, "N 3 2 2"]:
    """Draw every kind of glyph: the coordinates of its strokes' ends, the same at every call."""
    return 1.6 * torch.rand(GLYPHS, STROKES, 2, 2, generator=torch.Generator().manual_seed(0)) - 0.8


def draw_glyphs(strokes: Float[Tensor, "*N 3 2 2"]) -> Float[Tensor, "*N H W"]:
    """Paint strokes: ink from 0 to 1 that fades with the distance to the nearest stroke."""
    ends = strokes.flatten(0, -3)
    distance = to_segment(grid(SIZE)[None], ends[:, 0], ends[:, 1])
    nearest = distance.view(*strokes.shape[:-2], SIZE, SIZE).amin(-3)
    return (1.5 - nearest / THICK).clamp(0, 1)


def episodes(
    strokes: Tensor, count: int, examples: int, draw: torch.Generator, *, held_out: bool
) -> tuple[Float[Tensor, "U KS H W"], Float[Tensor, "U KQ H W"]]:
    """Draw episodes, class by class: every glyph's stroke ends are moved anew each time it is written."""
    first, size = (GLYPHS - HELD_OUT, HELD_OUT) if held_out else (0, GLYPHS - HELD_OUT)
    chosen = first + torch.rand(count, size, generator=draw).argsort(1)[:, :CLASSES]
    shape = count, CLASSES, examples + QUESTIONS, STROKES, 2, 2
    shift = SHIFT * torch.randn(*shape[:3], 1, 1, 2, generator=draw)
    written = strokes[chosen][:, :, None] + JITTER * torch.randn(shape, generator=draw) + shift
    images = draw_glyphs(written)
    return images[:, :, :examples].flatten(1, 2), images[:, :, examples:].flatten(1, 2)
