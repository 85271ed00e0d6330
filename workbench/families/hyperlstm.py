"""Dynamic hypernetworks: a small LSTM rescales the weights of a larger one at every character.

The condition is the moment: a small LSTM of state g reads the input and the main state, and a signal z of a
few numbers per gate scales the rows of the main LSTM's matrices. With gates y of i, j, f, o:

    g_t = LSTM([x_t, h_{t-1}], g_{t-1}),   z_y = V_y g_t + c_y                                          (1)
    y_t = d_h(z_y) * (W_hy h_{t-1}) + d_x(z_y) * (W_xy x_t) + b(z_y)                                    (2)
    c_t = sigmoid(f_t) * c_{t-1} + sigmoid(i_t) * tanh(j_t),   h_t = sigmoid(o_t) * tanh(c_t)           (3)

d_h, d_x and b are linear in z. W is not generated, its rows are scaled: that is what makes it affordable. At
the start V = 0, c = 1 and d(z) is the same number everywhere, so the network starts as a plain LSTM
(:mod:`workbench.families.recurrent`). With LayerNorm, every gate of (2) and c_t before its tanh are
normalised over the units, with learned scale and shift.

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
from workbench.families.recurrent import GATES, Cell, Lstm, start_bias
from workbench.families.tasks import trained_parameters
from workbench.files import digest
from workbench.hypernetworks import ParamSpec, Slot
from workbench.hypernetworks.generators import cost_of_numbers
from workbench.hypernetworks.health import health_of_weights
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit_drawn

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

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


class HyperLstm(Lstm):
    """The main LSTM with rows scaled by a small one; equations (1) and (2)."""

    def __init__(self, kinds: int, model: LstmModel) -> None:
        super().__init__(kinds, model.width, norm=model.norm)
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
    net = HyperLstm(kinds, model) if model.kind == "hyper" else Lstm(kinds, model.width, norm=model.norm)
    columns = torch.arange(recipe.length + 1)
    training = recipe.training

    def loss(count: int, draw: torch.Generator) -> Tensor:
        starts = torch.randint(len(train) - recipe.length, (count, 1), generator=draw)
        pieces = train[starts + columns]
        return bits_per_character(net(pieces[:, :-1]), pieces[:, 1:])

    history = fit_drawn(net, loss, model.longer * recipe.steps, training, folder, seed=seed)
    with torch.no_grad():
        bits = bits_per_character(net(test[:, :-1]), test[:, 1:])
    parameters = trained_parameters(net)
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
