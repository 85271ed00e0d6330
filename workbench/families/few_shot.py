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
from workbench.families.glyphs import CLASSES, GLYPHS, HELD_OUT, QUESTIONS, draw_strokes, episodes
from workbench.files import digest
from workbench.hypernetworks import Conditioned, GeneratedWeights, ParamSpec, SetGenerator
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit_drawn

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]


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
    strokes = draw_strokes()
    counts = {"train": {"glyphs": GLYPHS - HELD_OUT}, "test": {"glyphs": HELD_OUT}}
    return Loaded(strokes, digest(str(strokes.tolist())), counts)


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

    def loss(count: int, draw: torch.Generator) -> Tensor:
        logits = net(*episodes(strokes, count, recipe.examples, draw, held_out=False))
        return functional.cross_entropy(logits.flatten(0, 1), truth.repeat(count))

    history = fit_drawn(net, loss, recipe.steps, training, folder, seed=seed)
    about = {"parameters": sum(one.numel() for one in net.parameters()), "history": history}
    with torch.no_grad():
        right = net(examples, questions).argmax(-1) == truth
        if isinstance(net.encoder, Conditioned):
            about |= net.encoder.card(net.tokens(examples[:64]), questions[0, :, None])
        if net.head is not None:
            about |= net.head.card(net.encode(examples[:64]), net.encode(questions[:1])[0])
    return Outcome({"accuracy": float(right.double().mean())}, right.numel(), about)


compare = comparison_of(measure)
