"""One encoder, several domains: adapters per domain, shared or generated, beside full fine-tuning.

The last layer of a frozen sentence encoder is adapted to a domain, so that requests with the same intent come
to lie together: each step takes two texts of every intent of one domain, and a text's partner is its positive
among the others (symmetric InfoNCE). A test text belongs to the intent with the nearest mean of the domain's
few training texts. What may differ from domain to domain:

    full         all parameters of the layer                                                            (1)
    bottleneck   x + U_d gelu(V_d x + v_d) + u_d after attention and after feed-forward (Houlsby)        (2)
    LoRA         W + A_d B_d in the query and value maps                                                (3)

with a set for each domain, trained alone (``of: domain``); one set for all domains (``all``); or one
generated from the domain's description, its name and those of its intents (``text``). Generated and shared
sets can be used in a domain that was never trained on: ``accuracy_new``, with its texts only as class means.

``share_of_full`` is how many numbers a domain has of its own, as a share of (1). ``swap_bytes`` are read to
change the domain, four for a number, and ``swap_operations`` are the multiplications that generating takes.
A card's ``swap_seconds`` is what a change took: the median of 50, after five, from a domain's own numbers in
memory, warm and on as many threads as trained, to weights that the layer runs with. It says nothing of the
disk, and it is no metric, since it differs from run to run.

Reduced: the layers below the last are read once and stay as they are, also in full fine-tuning; a few steps
on a few texts of each intent. So what is compared is the adapters, not how far an encoder can be adapted.

Shape letters: M domains, K intents of a domain, S training texts and Q test texts of an intent, N texts,
L tokens, D width, C condition width.

Source: Houlsby et al. (2019), arXiv 1902.00751, section 2; Hu et al. (2021), LoRA, arXiv 2106.09685, section
4.1; Schopf, Schneider and Matthes (2023), Efficient Domain Adaptation of Sentence Embeddings Using Adapters,
arXiv 2307.03104. Deviation: new adapters start with small random weights in place of zeros.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import polars as pl
import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from workbench.encoders import TextEncoder, TokenStates
from workbench.families.comparison import FamilyModel, Outcome, SplitRecipe, comparison_of, needs_tokens
from workbench.files import digest
from workbench.finetuning import TokenIds
from workbench.geometry.uniformity import placement
from workbench.hypernetworks import Conditioned, MLPGenerator, ParamSpec, Table
from workbench.hypernetworks.generators import standardise
from workbench.manifests import verified_folder
from workbench.objectives import paired_contrastive
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

HIDDEN = 64  # of the hypernetwork
SWAPS, WARM = 50, 5  # changes of the domain that are timed, and that go before them


class DomainModel(FamilyModel):
    """What is adapted, and what the domains share."""

    kind: Literal["frozen", "full", "bottleneck", "lora"]
    of: Literal["domain", "all", "text"] = "domain"
    width: int = Field(default=8, gt=0, description="of the bottleneck, or the rank of LoRA")
    learning_rate: float | None = Field(default=None, gt=0, description="instead of the recipe's")

    @model_validator(mode="after")
    def _only_adapters_are_shared_or_generated(self) -> "DomainModel":
        if self.kind in ("frozen", "full") and self.of != "domain":
            raise ValueError(
                f"model {self.name}: kind {self.kind} is not shared or generated; leave out 'of'"
            )
        return self


class DomainRecipe(SplitRecipe):
    """Settings of the comparison."""

    paper: Literal["domains"]
    models: tuple[DomainModel, ...] = Field(min_length=1)
    training: Training
    domains: tuple[str, ...] = Field(min_length=1, description="that are trained on")
    new: tuple[str, ...] = Field(min_length=1, description="that are not")
    steps: int = Field(gt=0, description="of training for each domain")
    examples: int = Field(gt=1, description="S, texts of an intent to train on and for its mean")
    questions: int = Field(gt=0, description="Q, test texts of an intent")
    scale: float = Field(default=20.0, gt=0, description="inverse temperature of the contrast")


RECIPE = DomainRecipe


class TopLayer(nn.Module):
    """The last layer of an encoder, with the pooling: states below it in, unit vectors out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, packed: Float[Tensor, "N L D_plus_1"]) -> Float[Tensor, "N D"]:
        """Embed texts; the last entry of a packed state is 1 on real tokens and 0 on padding."""
        states, mask = packed[..., :-1], packed[..., -1:]
        hidden = (mask[..., 0] - 1)[:, None, None] * 1e4
        read = self.layer(states, hidden) * mask
        return functional.normalize(read.sum(1) / mask.sum(1), dim=-1)


class Bottleneck(nn.Module):
    """Equation (2); the parameters are zero here and come from a table or a hypernetwork."""

    def __init__(self, outer: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(outer, inner), nn.Linear(inner, outer)
        for one in self.parameters():
            nn.init.zeros_(one)

    def forward(self, states: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        """Add what passes through the bottleneck."""
        return states + self.up(functional.gelu(self.down(states)))


@dataclass(frozen=True)
class Domains:
    """Texts of every intent of every domain; rows of ``texts`` by domain and intent."""

    encoder: TextEncoder
    texts: list[str]
    train: Int[Tensor, "M K S"]
    test: Int[Tensor, "M K Q"]
    about: list[str]

    @cached_property
    def read(self) -> tuple[TopLayer, TokenStates]:
        """The encoder's last layer, and every text read up to it, once."""
        body = copy.deepcopy(self.encoder.model[0].auto_model)
        body.set_attn_implementation("eager")  # the fused kernel has no rule for several sets of weights
        ids = TokenIds.of(self.encoder, self.texts, "cpu")
        order, found = ids.offsets.diff().argsort(stable=True), {}
        with torch.no_grad():
            for part in order.split(64):
                tokens, _, mask = ids.padded(part)
                # The states that enter the last layer.
                states = body(tokens, mask.long(), output_hidden_states=True).hidden_states[-2]
                found |= {row: one[own] for row, one, own in zip(part.tolist(), states, mask, strict=True)}
        states = torch.cat([found[row] for row in range(len(self.texts))])
        return TopLayer(body.encoder.layer[-1].requires_grad_(True)), TokenStates(states, ids.offsets)

    @cached_property
    def described(self) -> Float[Tensor, "M C"]:
        """The embeddings of the domains' descriptions."""
        return standardise(self.encoder.encode(self.about))

    def packed(self, rows: Int[Tensor, " N"]) -> Float[Tensor, "N L D_plus_1"]:
        """Gather texts for :class:`TopLayer`."""
        states, mask = self.read[1].padded(rows)
        return torch.cat([states, mask[..., None]], -1)


def load_data(recipe: DomainRecipe) -> Loaded:
    """Read the first texts of every intent of the recipe's domains, those trained on first."""
    folder, names = verified_folder(recipe.data.name), [*recipe.domains, *recipe.new]
    files = {"train": "train", "valid": "val", "test": "test"}
    tables = {
        split: pl.read_parquet(folder / f"{files[split]}.parquet")
        .filter(pl.col("domain").is_in(names), pl.int_range(pl.len()).over("intent") < count)
        for split, count in (("train", recipe.examples), (recipe.split, recipe.questions))
    }  # fmt: skip
    content = domains_of(TextEncoder(recipe.encoder), *tables.values(), names)
    counts = {split: {"texts": table.height, "domains": len(names)} for split, table in tables.items()}
    return Loaded(content, digest(str(names), *(table.write_json() for table in tables.values())), counts)


def domains_of(encoder: TextEncoder, train: pl.DataFrame, test: pl.DataFrame, names: list[str]) -> Domains:
    """Number the texts; there are as many for each intent, and as many intents in each domain."""
    intents = [sorted(train.filter(domain=name)["intent"].unique().to_list()) for name in names]
    texts, rows = [], []
    for table in (train, test):
        own = [[table.filter(intent=intent)["text"].to_list() for intent in some] for some in intents]
        count = sum(len(part) for some in own for part in some)
        rows.append(len(texts) + torch.arange(count).view(len(names), len(own[0]), -1))
        texts += [text for some in own for part in some for text in part]
    about = [
        f"{name}: {', '.join(some)}".replace("_", " ") for name, some in zip(names, intents, strict=True)
    ]
    return Domains(encoder, texts, *rows, about)


def adapted(top: TopLayer, model: DomainModel, condition_width: int) -> nn.Module:
    """Return a copy of the layer, all of it to be trained or with adapters in it."""
    top = copy.deepcopy(top)
    if model.kind in ("frozen", "full"):
        return top
    if model.kind == "lora":
        spec = ParamSpec.of(top, ["*.query.weight", "*.value.weight"], rank=model.width, gain=0.1)
    else:
        for part in (top.layer.attention.output, top.layer.output):
            part.dense = nn.Sequential(part.dense, Bottleneck(part.dense.out_features, model.width))
        spec = ParamSpec.of(top, "*.dense.1.*")
    if model.of == "text":
        return Conditioned(top, MLPGenerator(condition_width, spec, (HIDDEN,), unit=True), learn_base=False)
    return Conditioned(top, Table(1, spec), learn_base=False)


def embed(net: nn.Module, content: Domains, domain: int, rows: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
    """Embed texts as this domain does."""
    packed = content.packed(rows.flatten())
    if not isinstance(net, Conditioned):
        return net(packed).unflatten(0, rows.shape)
    generated = isinstance(net.generator, MLPGenerator)
    condition = content.described[domain][None] if generated else torch.zeros(1, dtype=torch.long)
    return net(packed, net.weights(condition)).unflatten(0, rows.shape)


@torch.no_grad()
def accuracy(net: nn.Module, content: Domains, domain: int) -> float:
    """Return how often a test text is nearest to the mean of its own intent's training texts; 0 to 1."""
    means = embed(net, content, domain, content.train[domain]).mean(1)
    asked = embed(net, content, domain, content.test[domain])
    found = (asked @ functional.normalize(means, dim=-1).T).argmax(-1)
    return float((found == torch.arange(len(means))[:, None]).double().mean())


def train(
    net: nn.Module,
    recipe: DomainRecipe,
    content: Domains,
    model: DomainModel,
    domains: list[int],
    seed: int,
    folder: Path,
) -> list[dict[str, int | float]]:
    """Train on some domains in turn; returns the history."""

    def loss(items: Tensor) -> Tensor:
        # An item is one step: its number names the domain and seeds the texts, also after a resume.
        item = int(items[0])
        domain, draw = domains[item % len(domains)], torch.Generator().manual_seed(item * 1009 + seed)
        texts = content.train[domain]
        two = torch.rand(texts.shape, generator=draw).argsort(1)[:, :2]
        one, other = embed(net, content, domain, texts.gather(1, two)).unbind(1)
        return paired_contrastive(one, other, recipe.scale)

    training = recipe.training.at_rate(model.learning_rate)
    return fit(net, loss, recipe.steps * len(domains), training, folder, seed=seed)


def costs(net: nn.Module, model: DomainModel, full: int) -> dict[str, float]:
    """Count a domain's own numbers and what it takes to change the domain."""
    own, operations = 0, 0
    if model.kind != "frozen" and model.of != "all":
        own = full if model.kind == "full" else net.spec.numel
    if model.of == "text":
        operations = sum(one.numel() for one in net.generator.parameters() if one.ndim > 1)
        own = 0
    return {
        "share_of_full": own / full,
        "swap_bytes": 4.0 * (own if model.of != "text" else net.generator.body[0].in_features),
        "swap_operations": float(operations),
    }


def swap(net: nn.Module, content: Domains, model: DomainModel) -> Callable[[], object] | None:
    """Return what brings a domain's own numbers into the layer; None where no row differs by domain.

    A full layer's numbers are copied into its parameters, an adapter's into the table's row and laid out as
    factors or maps; a generated one is generated from the domain's description.
    """
    if model.kind == "frozen" or model.of == "all":
        return None
    if model.of == "text":
        return lambda: net.weights(content.described[:1])
    own = net if model.kind == "full" else net.generator
    kept = {name: one.clone() for name, one in own.state_dict().items()}
    if model.kind == "full":
        return lambda: own.load_state_dict(kept)
    return lambda: (own.load_state_dict(kept), net.weights(torch.zeros(1, dtype=torch.long)))


@torch.no_grad()
def swap_seconds(net: nn.Module, content: Domains, model: DomainModel) -> float:
    """Return the median seconds of a change of the domain; 0 where nothing is to be changed."""
    action, found = swap(net, content, model), []
    if action is None:
        return 0.0
    for _ in range(WARM + SWAPS):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return statistics.median(found[WARM:])


def measure(recipe: DomainRecipe, content: Domains, model: DomainModel, seed: int, folder: Path) -> Outcome:
    """Train one row, domain by domain or on all of them, and classify test texts."""
    old, condition_width = range(len(recipe.domains)), content.described.shape[1]
    new = range(len(recipe.domains), len(content.train))
    full = sum(one.numel() for one in content.read[0].parameters())
    alone = [[domain] for domain in old] if model.of == "domain" else [[*old]]
    right, history, about = [], [], {}
    for domains in alone:
        net = adapted(content.read[0], model, condition_width).eval()
        if model.kind != "frozen":
            own = folder / str(domains[0])
            own.mkdir(parents=True, exist_ok=True)
            history.append(train(net, recipe, content, model, domains, seed, own))
        right += [accuracy(net, content, domain) for domain in domains]
    values = {"accuracy": sum(right) / len(right), **costs(net, model, full)}
    if model.kind == "frozen" or model.of != "domain":
        values["accuracy_new"] = sum(accuracy(net, content, domain) for domain in new) / len(new)
    trained = [one for one in net.parameters() if one.requires_grad]
    about["parameters"] = 0 if model.kind == "frozen" else len(alone) * sum(one.numel() for one in trained)
    about["history"] = history[0] if history else []
    about["swap_seconds"] = swap_seconds(net, content, model)
    with torch.no_grad():  # of the last domain: texts of one intent should lie near each other
        asked = embed(net, content, old[-1], content.test[old[-1]])
    about["geometry"] = placement(asked[:, 0], asked[:, 1], asked.flatten(0, 1))
    if model.of == "text":
        inputs = content.packed(content.test[0, 0])
        about |= net.card(content.described, inputs)
    return Outcome(values, content.test[: len(old)].numel(), about)


compare = comparison_of(measure)
