"""Few-shot classification: a transformer reads labelled examples and writes the last layer, or all others.

An episode shows K glyphs never seen in training, S examples of each, and asks about others. All rows share a
small convolutional encoder e. A prototypical network answers with the nearest class mean m_k, which is a
linear layer whose weights come from the examples in closed form:

    -|e(x) - m_k|^2 = 2 m_k . e(x) - |m_k|^2 + const,   so w_k = 2 m_k, b_k = -|m_k|^2                  (1)

A hypertransformer generates them: tokens are the examples, [e(x_i), label code], and K placeholders, one per
class; after a few self-attention layers, placeholder k holds the weights of class k:

    (w_k, b_k) = H(examples, placeholders)_k                                                            (2)
    (w_k, b_k) = (2 m_k, -|m_k|^2) + H(examples, placeholders)_k                                        (3)

(2) learns the whole layer from scratch, as published; (3) starts at the prototypical network and learns what
is left. The third control is the nearest neighbour in raw pixels, which needs no training: where it is good,
the data are too easy to show anything.

The paper finds the last layer enough for larger encoders, and that generating all layers helps very small
ones. Kind ``layers`` generates what is added to every convolution and norm of e, in one go from the set of
examples, and its last layer is (1) on the features of the encoder that comes of it:

    e'(x) = e(x; theta + H({[e(x_i), label code]}))                                                     (4)

Deviation: the paper writes one layer after the other, each from the activations of the one before.

Shape letters: U episodes at once, K classes, S examples of a class, Q questions of a class, D features.

Source: Zhmoginov, Sandler and Vladymyrov (2022), HyperTransformer, arXiv 2201.04182, section 3; prototypes:
Snell, Swersky and Zemel (2017), arXiv 1703.05175, section 2.4 for (1).
"""

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from workbench.families.comparison import FamilyModel, FamilyRecipe, Outcome, comparison_of, needs_tokens
from workbench.families.fields import grid, to_segment
from workbench.files import digest
from workbench.hypernetworks import Conditioned, GeneratedWeights, ParamSpec, SetGenerator
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

SIZE, STROKES = 14, 3  # of a glyph
JITTER, SHIFT, THICK = 0.2, 0.15, 0.1  # of a stroke's ends, of the whole glyph, of the ink; in half sides
GLYPHS, HELD_OUT = 500, 100  # kinds of glyphs, and how many of them only test episodes show
CLASSES, QUESTIONS = 5, 5


class FewShotModel(FamilyModel):
    """Where the last layer comes from."""

    kind: Literal["pixels", "prototypes", "scratch", "residual", "layers"]
    channels: int = Field(default=16, gt=0, description="of each of the encoder's three convolutions")
    learning_rate: float | None = Field(default=None, gt=0, description="null: the recipe's")


class FewShotRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["few_shot"]
    models: tuple[FewShotModel, ...] = Field(min_length=1)
    training: Training
    examples: int = Field(default=1, gt=0, description="of each class")
    steps: int = Field(gt=0, description="of training; each sees batch_size episodes")
    test_episodes: int = Field(default=400, gt=0)


RECIPE = FewShotRecipe


def load_data(recipe: FewShotRecipe) -> Loaded:
    """Draw every glyph's strokes, by the coordinates of their ends."""
    strokes = 1.6 * torch.rand(GLYPHS, STROKES, 2, 2, generator=torch.Generator().manual_seed(0)) - 0.8
    counts = {"train": {"glyphs": GLYPHS - HELD_OUT}, "test": {"glyphs": HELD_OUT}}
    return Loaded(strokes, digest(str(strokes.tolist())), counts)


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


def prototypes(features: Float[Tensor, "U KS D"]) -> Float[Tensor, "U K D"]:
    """Return the mean of each class's examples."""
    return features.unflatten(1, (CLASSES, -1)).mean(2)


def linear_form(means: Float[Tensor, "U K D"]) -> Float[Tensor, "U P"]:
    """Return the weights, then the biases, of the linear layer that asks for the nearest mean; (1)."""
    return torch.cat([(2 * means).flatten(1), -means.square().sum(-1)], 1)


class ClassGenerator(nn.Module):
    """Equations (2) and (3): from features of labelled examples to the last layer."""

    def __init__(self, spec: ParamSpec, features: int, *, residual: bool, width: int = 64) -> None:
        super().__init__()
        self.spec, self.residual = spec, residual
        self.enter, self.labels = nn.Linear(features, width), nn.Parameter(torch.randn(CLASSES, width))
        self.placeholder = nn.Parameter(torch.randn(width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, features + 1)
        if residual:  # near zero, not at it: a generator's health is its change over its start
            nn.init.normal_(self.head.weight, std=1e-3)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Float[Tensor, "U KS D"]) -> GeneratedWeights:
        """Generate the last layer of U episodes, examples laid class by class."""
        labels = self.labels.repeat_interleave(features.shape[1] // CLASSES, 0)
        tokens = self.enter(features) + labels
        placeholders = (self.placeholder + self.labels).expand(len(features), -1, -1)
        read = self.transformer(torch.cat([placeholders, tokens], 1))[:, :CLASSES]
        made = self.head(read)
        coefficients = torch.cat([made[..., :-1].flatten(1), made[..., -1]], 1)
        if self.residual:
            coefficients = coefficients + linear_form(prototypes(features))
        return self.spec.compose(coefficients)


class FewShotNet(nn.Module):
    """The encoder, and what answers on its features."""

    def __init__(self, model: FewShotModel) -> None:
        super().__init__()
        c = model.channels
        layers = [nn.Conv2d(1, c, 5, stride=2, padding=2), nn.GroupNorm(1, c), nn.ReLU()]
        layers += [nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(1, c), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(1, c), nn.ReLU(), nn.Flatten()]
        self.encoder = nn.Sequential(*layers)  # maps of 14, 7 and 3 pixels a side
        self.head = None
        if model.kind == "layers":
            generator = SetGenerator(9 * c + CLASSES, ParamSpec.of(self.encoder), width=64)
            self.encoder = Conditioned(self.encoder, generator)
        elif model.kind != "prototypes":
            target = nn.Linear(9 * c, CLASSES)
            spec = ParamSpec(ParamSpec.of(target, joins="replace").slots, scaled=False)
            generator = ClassGenerator(spec, 9 * c, residual=model.kind == "residual")
            self.head = Conditioned(target, generator)

    def encode(self, images: Float[Tensor, "U M H W"]) -> Float[Tensor, "U M D"]:
        """Return the features of every image, by the encoder's own weights."""
        own = self.encoder.target if isinstance(self.encoder, Conditioned) else self.encoder
        return own(images.flatten(0, 1)[:, None]).unflatten(0, images.shape[:2])

    def tokens(self, examples: Tensor) -> Float[Tensor, "U KS C"]:
        """Return what (4) reads: features of unit variance beside the label."""
        features = self.encode(examples)
        labels = functional.one_hot(torch.arange(CLASSES).repeat_interleave(examples.shape[1] // CLASSES))
        known = functional.layer_norm(features, features.shape[-1:])
        return torch.cat([known, labels.expand(len(examples), -1, -1).to(known)], -1)

    def forward(self, examples: Tensor, questions: Tensor) -> Float[Tensor, "U KQ K"]:
        """Return each question's log odds of the classes."""
        count, images = examples.shape[1], torch.cat([examples, questions], 1)
        if isinstance(self.encoder, Conditioned):
            each = images[:, :, None] if len(images) > 1 else images[0, :, None]
            features = self.encoder(each, self.encoder.weights(self.tokens(examples)))
            features = features.view(*images.shape[:2], -1)
        else:
            features = self.encode(images)
        shown, asked = features[:, :count], features[:, count:]
        if self.head is None:
            return -torch.cdist(asked, prototypes(shown)).square()
        return self.head(asked, self.head.weights(shown))


def nearest(examples: Tensor, questions: Tensor) -> Int[Tensor, "U KQ"]:
    """Answer with the class of the nearest example in raw pixels."""
    closest = torch.cdist(questions.flatten(2), examples.flatten(2)).argmin(-1)
    return closest // (examples.shape[1] // CLASSES)


def measure(recipe: FewShotRecipe, strokes: Tensor, model: FewShotModel, seed: int, folder: Path) -> Outcome:
    """Train one row and ask it about glyphs never seen in training."""
    truth = torch.arange(CLASSES).repeat_interleave(QUESTIONS)
    draw = torch.Generator().manual_seed(10_000_019 + seed)
    examples, questions = episodes(strokes, recipe.test_episodes, recipe.examples, draw, held_out=True)
    if model.kind == "pixels":
        right = nearest(examples, questions) == truth
        return Outcome({"accuracy": float(right.double().mean())}, right.numel(), {"parameters": 0})
    net, training = FewShotNet(model), recipe.training.at_rate(model.learning_rate)

    def loss(items: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(int(items[0]) * 1009 + seed)
        logits = net(*episodes(strokes, len(items), recipe.examples, draw, held_out=False))
        return functional.cross_entropy(logits.flatten(0, 1), truth.repeat(len(items)))

    history = fit(net, loss, recipe.steps * training.batch_size, training, folder, seed=seed)
    about = {"parameters": sum(one.numel() for one in net.parameters()), "history": history}
    with torch.no_grad():
        right = net(examples, questions).argmax(-1) == truth
        if isinstance(net.encoder, Conditioned):
            shown, asked = net.tokens(examples[:64]), questions[0, :, None]
            about |= {"cost": net.encoder.cost(), "health": net.encoder.health(shown, asked).to_dict()}
        if net.head is not None:
            shown, asked = net.encode(examples[:64]), net.encode(questions[:1])[0]
            about |= {"cost": net.head.cost(), "health": net.head.health(shown, asked).to_dict()}
    return Outcome({"accuracy": float(right.double().mean())}, right.numel(), about)


compare = comparison_of(measure)
