"""An LSTM with LayerNorm, written out, so that what its gates add up can be changed from outside.

With gates i, j, f and o, of the input x_t and the state h_{t-1}:

    y_t = W_hy h_{t-1} + W_xy x_t + b_y,   y of i, j, f, o                                              (1)
    c_t = sigmoid(f_t) * c_{t-1} + sigmoid(i_t) * tanh(j_t),   h_t = sigmoid(o_t) * tanh(c_t)           (2)

With LayerNorm, every gate of (1) and c_t before its tanh are normalised over the units, with learned scale
and shift.

Shape letters: B texts at once, L characters, V kinds of characters, H width, Y = 4 H the gates side by side.

Source: Hochreiter and Schmidhuber (1997), Long short-term memory; LayerNorm: Ba, Kiros and Hinton (2016),
arXiv 1607.06450; starts as in the first author's code of HyperNetworks, hardmaru/supercell.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

GATES, FORGET = 4, 2  # i, j, f, o, and where f stands


class Normalise(nn.Module):
    """LayerNorm over the units, each gate on its own, with learned scale and shift; or nothing at all."""

    def __init__(self, gates: int, width: int, *, active: bool) -> None:
        """Take so many gates side by side, each of that width."""
        super().__init__()
        self.shape = gates, width
        self.scale = nn.Parameter(torch.ones(gates * width)) if active else None
        self.shift = nn.Parameter(torch.zeros(gates * width)) if active else None

    def forward(self, inputs: Float[Tensor, "B _"]) -> Float[Tensor, "B _"]:
        """Normalise."""
        if self.scale is None:
            return inputs
        normal = functional.layer_norm(inputs.unflatten(1, self.shape), self.shape[1:]).flatten(1)
        return torch.addcmul(self.shift, normal, self.scale)


class Cell(nn.Module):
    """Equation (2) on gates that come from somewhere, with LayerNorm or without."""

    def __init__(self, width: int, *, norm: bool) -> None:
        """Build what normalises the gates and the cell."""
        super().__init__()
        self.gates, self.cell = Normalise(GATES, width, active=norm), Normalise(1, width, active=norm)

    def forward(
        self, made: Float[Tensor, "B Y"], cell: Float[Tensor, "B H"]
    ) -> tuple[Float[Tensor, "B H"], Float[Tensor, "B H"]]:
        """Return the new state and the new cell."""
        i, j, f, o = self.gates(made).chunk(GATES, 1)
        cell = f.sigmoid() * cell + i.sigmoid() * j.tanh()
        return o.sigmoid() * self.cell(cell).tanh(), cell


def start_bias(width: int) -> nn.Parameter:
    """Return biases of the gates: 1 for the forget gate, so that a cell remembers at the start, else 0."""
    bias = torch.zeros(GATES, width)
    bias[FORGET] = 1
    return nn.Parameter(bias.flatten())


class Lstm(nn.Module):
    """Characters in, log odds of the next one out; a subclass may add to the state and change the step."""

    def __init__(self, kinds: int, width: int, *, norm: bool) -> None:
        """Build it for that many kinds of characters."""
        super().__init__()
        self.width = width
        self.inputs = nn.Embedding(kinds, GATES * width)  # W_x on one-hot characters is a look-up
        self.recurrent = nn.Linear(width, GATES * width, bias=False)
        nn.init.normal_(self.inputs.weight, std=0.3)
        nn.init.orthogonal_(self.recurrent.weight)
        self.bias, self.cell = start_bias(width), Cell(width, norm=norm)
        self.read = nn.Linear(width, kinds)

    def begin(self, count: int) -> tuple[Tensor, ...]:
        """Return the state before the first character."""
        return tuple(torch.zeros(count, self.width) for _ in range(2))

    def step(self, inputs: Float[Tensor, "B Y"], state: tuple[Tensor, ...], _: Tensor) -> tuple[Tensor, ...]:
        """Read one character."""
        return self.cell(inputs + self.recurrent(state[0]) + self.bias, state[1])

    def forward(self, text: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """Return log odds of the character after each."""
        state, states = self.begin(len(text)), []
        for inputs, character in zip(self.inputs(text).unbind(1), text.unbind(1), strict=True):
            state = self.step(inputs, state, character)
            states.append(state[0])
        return self.read(torch.stack(states, 1))
