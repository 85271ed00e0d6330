"""A space of small architectures, each a row of bits, and one network that can be any of them.

An architecture of four layers has for each layer a width (2, 4, 8 or 32), an activation (ReLU, tanh or none)
and says whether the layer's input is added to its output (a skip; not in the first layer). With masks m for
the width and u for the activation, layer i of every architecture is

    h_i = m_i * sum_a u_ia a(W_i h_{i-1} + b_i) + skip_i h_{i-1}                                        (1)

so all of them fit into the weights of the widest, and one batch can hold many. The bits of a layer are its
width and its activation, one-hot, then the skip.

Shape letters: U architectures, M images, B bits.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from workbench.datasets.digits import CLASSES, PIXELS

LAYERS, WIDTHS = 4, (2, 4, 8, 32)
ACTIVATIONS = (torch.relu, torch.tanh, lambda inputs: inputs)
WIDEST, PER_LAYER = max(WIDTHS), len(WIDTHS) + len(ACTIVATIONS) + 1
BITS = LAYERS * PER_LAYER


def architectures(count: int, draw: torch.Generator) -> Float[Tensor, "U B"]:
    """Draw architectures as rows of zeros and ones."""
    width = torch.randint(len(WIDTHS), (count, LAYERS), generator=draw)
    activation = torch.randint(len(ACTIVATIONS), (count, LAYERS), generator=draw)
    skip = torch.randint(2, (count, LAYERS, 1), generator=draw)
    skip[:, 0] = 0  # the image is wider than a layer
    one_hot = functional.one_hot
    bits = [one_hot(width, len(WIDTHS)), one_hot(activation, len(ACTIVATIONS)), skip]
    return torch.cat(bits, -1).flatten(1).float()


class EveryArchitecture(nn.Module):
    """The widest network; the bits of the architecture ride along with every image; equation (1)."""

    def __init__(self) -> None:
        """Build the network of the widest architecture."""
        super().__init__()
        fan_ins = [PIXELS] + [WIDEST] * (LAYERS - 1)
        self.layers = nn.ModuleList(nn.Linear(fan_in, WIDEST) for fan_in in fan_ins)
        self.head = nn.Linear(WIDEST, CLASSES)
        self.register_buffer("masks", (torch.arange(WIDEST) < torch.tensor(WIDTHS)[:, None]).float())

    def forward(self, rows: Float[Tensor, "*U M _"]) -> Float[Tensor, "*U M 10"]:
        """Return log odds of the digits for rows of pixels followed by bits."""
        hidden, bits = rows[..., :PIXELS], rows[..., PIXELS:].unflatten(-1, (LAYERS, PER_LAYER))
        for number, layer in enumerate(self.layers):
            width, activation, skip = bits[..., number, :].split([len(WIDTHS), len(ACTIVATIONS), 1], -1)
            made = layer(hidden)
            made = sum(act(made) * activation[..., [which]] for which, act in enumerate(ACTIVATIONS))
            made = made * (width @ self.masks)
            hidden = made + skip * hidden if number else made
        return self.head(hidden)


def beside(images: Float[Tensor, "M 64"], codes: Float[Tensor, "U B"]) -> Float[Tensor, "U M _"]:
    """Lay the same images out for each architecture, its bits beside each."""
    shape = len(codes), len(images), -1
    return torch.cat([images.expand(shape), codes[:, None].expand(shape)], -1)


def weights_of(codes: Float[Tensor, "U B"]) -> Float[Tensor, " U"]:
    """Count the weights and biases that an architecture really uses."""
    bits = codes.unflatten(1, (LAYERS, PER_LAYER))
    widths = bits[..., : len(WIDTHS)] @ torch.tensor(WIDTHS).float()
    # With a skip, units beyond a layer's width still carry what came before.
    reach = [torch.full((len(codes),), float(PIXELS))]
    total = torch.zeros(len(codes))
    for number in range(LAYERS):
        total += (reach[-1] + 1) * widths[:, number]
        carried = reach[-1] * bits[:, number, -1]
        reach.append(torch.maximum(widths[:, number], carried))
    return total + (reach[-1] + 1) * CLASSES
