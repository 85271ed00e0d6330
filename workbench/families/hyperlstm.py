"""Dynamic hypernetworks: a small LSTM rescales the weights of a larger one at every character.

The condition is the moment: a small LSTM of state g reads the input and the main state, and a signal z of a
few numbers per gate scales the rows of the main LSTM's matrices. With gates y of i, j, f, o:

    g_t = LSTM([x_t, h_{t-1}], g_{t-1}),   z_y = V_y g_t + c_y                                          (1)
    y_t = d_h(z_y) * (W_hy h_{t-1}) + d_x(z_y) * (W_xy x_t) + b(z_y)                                    (2)
    c_t = sigmoid(f_t) * c_{t-1} + sigmoid(i_t) * tanh(j_t),   h_t = sigmoid(o_t) * tanh(c_t)           (3)

d_h, d_x and b are linear in z. W is not generated, its rows are scaled: that is what makes it affordable. At
the start V = 0, c = 1 and d(z) is the same number everywhere, so the network starts as a plain LSTM. With
LayerNorm, every gate of (2) and c_t before its tanh are normalised over the units, with learned scale and
shift.

Rows: LSTM and HyperLSTM, plain and with LayerNorm, of the same width of h, and ``wider``, the normalised
LSTM without generated scales whose width is chosen so that it has at least as many weights as the normalised
HyperLSTM. A step of the HyperLSTM takes about twice as long, so ``wider_longer`` trains twice as many. The
published table compares equal widths; this one compares equal sizes and equal time too.

Reduced to fit a minute and a half on one core: width, length of a piece and above all steps; all rows are
far from converged. The text is the help that comes with Python, so it depends a little on Python's version.

Shape letters: B texts at once, L characters, V kinds of characters, H width, G width of the small LSTM,
Y = 4 H the gates side by side.

Source: Ha, Dai and Le (2016), HyperNetworks, arXiv 1609.09106, section 3.2 and the appendix on HyperLSTM;
starts as in the first author's code, hardmaru/supercell. Deviation: no recurrent dropout.
"""

import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from workbench.families.comparison import FamilyModel, FamilyRecipe, Outcome, comparison_of, needs_tokens
from workbench.files import digest
from workbench.hypernetworks import ParamSpec, Slot
from workbench.hypernetworks.generators import cost_of_numbers
from workbench.hypernetworks.health import health_of_weights
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

GATES, FORGET = 4, 2  # i, j, f, o, and where f stands
HELD_OUT, STREAMS = 16_000, 32  # characters at the end of the text, read as so many pieces


class LstmModel(FamilyModel):
    """Which recurrent network."""

    kind: Literal["lstm", "hyper"]
    norm: bool = Field(default=False, description="LayerNorm of gates and cell")
    width: int = Field(default=64, gt=0, description="H")
    small: int = Field(default=24, gt=0, description="G, of the small LSTM; only for kind hyper")
    signal: int = Field(default=4, gt=0, description="numbers of z per gate; only for kind hyper")
    longer: int = Field(default=1, gt=0, description="times as many steps as the recipe says")


class LstmRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["hyperlstm"]
    models: tuple[LstmModel, ...] = Field(min_length=1)
    training: Training
    steps: int = Field(gt=0, description="of training; each sees batch_size pieces of the text")
    length: int = Field(gt=0, description="characters of a piece; no gradient goes beyond")


RECIPE = LstmRecipe


def load_data(recipe: LstmRecipe) -> Loaded:
    """Read the text that comes with Python; the last characters are held out."""
    text = "\n".join(topics[name] for name in sorted(topics))
    kinds = {character: number for number, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([kinds[character] for character in text])
    counts = {"train": {"characters": len(text) - HELD_OUT}, "test": {"characters": HELD_OUT}}
    return Loaded((numbers, len(kinds)), digest(text), counts)


class Normalise(nn.Module):
    """LayerNorm over the units, each gate on its own, with learned scale and shift; or nothing at all."""

    def __init__(self, gates: int, width: int, *, active: bool) -> None:
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
    """Equation (3) on gates that come from somewhere, with LayerNorm or without."""

    def __init__(self, width: int, *, norm: bool) -> None:
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
    """The main LSTM alone."""

    def __init__(self, kinds: int, model: LstmModel) -> None:
        super().__init__()
        self.width = width = model.width
        self.inputs = nn.Embedding(kinds, GATES * width)  # W_x on one-hot characters is a look-up
        self.recurrent = nn.Linear(width, GATES * width, bias=False)
        nn.init.normal_(self.inputs.weight, std=0.3)
        nn.init.orthogonal_(self.recurrent.weight)
        self.bias, self.cell = start_bias(width), Cell(width, norm=model.norm)
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


class HyperLstm(Lstm):
    """The main LSTM with rows scaled by a small one; equations (1) and (2)."""

    def __init__(self, kinds: int, model: LstmModel) -> None:
        super().__init__(kinds, model)
        small, signal, width = model.small, model.signal, model.width
        self.small, self.signal = small, signal
        self.small_inputs = nn.Embedding(kinds, GATES * small)
        self.small_recurrent = nn.Linear(width + small, GATES * small, bias=False)
        nn.init.normal_(self.small_inputs.weight, std=0.3)
        self.small_bias, self.small_cell = start_bias(small), Cell(small, norm=model.norm)
        # One z per gate and for each of d_h, d_x and b.
        self.embed = nn.Linear(small, 3 * GATES * signal)
        nn.init.zeros_(self.embed.weight)
        nn.init.ones_(self.embed.bias)
        # Published: 0.1, which LayerNorm undoes; without it the gates would start at a tenth of an LSTM's.
        start = (0.1 if model.norm else 1.0) / signal
        generated = torch.full((3, GATES, signal, width), start)
        generated[2] = 0
        self.generate = nn.Parameter(generated.flatten(0, 1))
        self.register_buffer("start", self.generate.detach().clone(), persistent=False)

    def begin(self, count: int) -> tuple[Tensor, ...]:
        """Return the state before the first character, the small LSTM's after the main one's."""
        return *super().begin(count), *(torch.zeros(count, self.small) for _ in range(2))

    def scales(self, small: Float[Tensor, "B G"]) -> Float[Tensor, "B 3 Y"]:
        """Return d_h, d_x and b from the small LSTM's state."""
        signals = self.embed(small).unflatten(1, (3 * GATES, self.signal))
        made = torch.bmm(signals.transpose(0, 1), self.generate).transpose(0, 1)
        return made.reshape(len(small), 3, GATES * self.width)

    def step(
        self, inputs: Float[Tensor, "B Y"], state: tuple[Tensor, ...], character: Tensor
    ) -> tuple[Tensor, ...]:
        """Read one character."""
        hidden, cell, small, small_cell = state
        made = self.small_inputs(character) + self.small_recurrent(torch.cat([hidden, small], 1))
        small, small_cell = self.small_cell(made + self.small_bias, small_cell)
        of_state, of_input, shift = self.scales(small).unbind(1)
        gates = of_state * self.recurrent(hidden) + of_input * inputs + shift + self.bias
        return *self.cell(gates, cell), small, small_cell


def bits_per_character(logits: Float[Tensor, "B L V"], text: Int[Tensor, "B L"]) -> Float[Tensor, ""]:
    """Return the mean bits that the text costs under the predictions; 0 or more, lower is better."""
    return functional.cross_entropy(logits.flatten(0, 1), text.flatten()) / math.log(2)


def measure(
    recipe: LstmRecipe, content: tuple[Tensor, int], model: LstmModel, seed: int, folder: Path
) -> Outcome:
    """Train one row on pieces of the text and let it predict the end of the text."""
    text, kinds = content
    train, test = text[:-HELD_OUT], text[-HELD_OUT:].view(STREAMS, -1)
    net = (HyperLstm if model.kind == "hyper" else Lstm)(kinds, model)
    columns = torch.arange(recipe.length + 1)
    training = recipe.training

    def loss(items: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(int(items[0]) * 1009 + seed)
        starts = torch.randint(len(train) - recipe.length, (training.batch_size, 1), generator=draw)
        pieces = train[starts + columns]
        return bits_per_character(net(pieces[:, :-1]), pieces[:, 1:])

    count = model.longer * recipe.steps * training.batch_size
    history = fit(net, loss, count, training, folder, seed=seed)
    with torch.no_grad():
        bits = bits_per_character(net(test[:, :-1]), test[:, 1:])
    parameters = sum(one.numel() for one in net.parameters())
    about = {"parameters": parameters, "history": history}
    if isinstance(net, HyperLstm):
        about |= card(net, test)
    return Outcome({"bits_per_character": float(bits), "parameters": parameters}, test.numel(), about)


@torch.no_grad()
def card(net: HyperLstm, test: Int[Tensor, "B L"]) -> dict[str, object]:
    """Say what the generator costs and whether moments move the weights: one moment in each test text."""
    generator = [net.small_inputs, net.small_recurrent, net.small_cell, net.embed]
    parameters = sum(one.numel() for part in generator for one in part.parameters())
    parameters += net.generate.numel() + net.small_bias.numel()
    state = net.begin(len(test))
    for character in test.T[:50]:
        state = net.step(net.inputs(character), state, character)
    made = net.scales(state[2]).flatten(1)
    spec = ParamSpec((Slot("scales", (made.shape[1],), "vector"),), scaled=False)
    health = health_of_weights(spec.compose(made), net.generate, net.start)
    return {"cost": cost_of_numbers(parameters, spec.numel), "health": health.to_dict()}


compare = comparison_of(measure)
