"""Live experiments on a zoo of encoders: what few epochs reach, and how an encoder that comes later joins.

Shape letters: C code width.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from workbench.evaluation.retrieval import recall_values, retrieval_ranks
from workbench.geometry.closed_form import LinearMap
from workbench.hypernetworks.connectors import ConnectorBank, ConnectorGenerator
from workbench.objectives import paired_contrastive
from workbench.papers import paper_of
from workbench.papers.hyper_align import BankLoss, Connected, HyperLoss, Task, training_flops
from workbench.papers.hyper_align_comparison import connect, open_content
from workbench.papers.hyper_align_settings import AlignModelSettings, HyperAlignRecipe
from workbench.training import Training, fit, seed_everything
from workbench.zoo import Zoo


def zoo_of(recipe: HyperAlignRecipe, most: int | None = None, device: str = "cpu") -> Zoo:
    """Open a recipe's zoo without its controls; features that a run computed are found again.

    Args:
        recipe: settings.
        most: only that many image encoders, the first ones; None for all.
        device: where encoders compute that have not been run yet.
    """
    content = paper_of(recipe.paper).load_data(recipe).content
    real = recipe.zoo.model_copy(update={"controls": (), "images": recipe.zoo.images[:most]})
    zoo = open_content(recipe.model_copy(update={"zoo": real}), content, device)
    return replace(zoo, images=dict(list(zoo.images.items())[:most]))


@torch.inference_mode()
def pair_recall(zoo: Zoo, text: str, image: str, connected: Connected, split: str = "test") -> float:
    """Return R@10 of a pair on a split, mean of both directions; 0 to 1, higher is better."""
    rows = zoo.splits[split]
    captions, features = zoo.choices[rows], zoo.images[image].unit(rows)
    if connected.of_image is not None:
        features = functional.normalize(connected.of_image(features), dim=1)
    mapped = functional.normalize(connected.of_text(zoo.texts[text].unit(captions.flatten())), dim=1)
    ranks = retrieval_ranks(mapped.unflatten(0, captions.shape), features)
    return float(recall_values(*(one.numpy() for one in ranks))["recall_at_10"].mean())


def quality_by_budget(
    zoo: Zoo, models: Sequence[AlignModelSettings], training: Training, text: str, epochs: Sequence[int],
    seed: int = 0,
) -> pl.DataFrame:  # fmt: skip
    """Train each way anew for every number of epochs and measure what all its pairs with one text reach.

    Args:
        zoo: without controls.
        models: the ways.
        training: for ways that have none of their own; its epochs are replaced.
        text: the text encoder.
        epochs: budgets; a closed form has one and is measured once.
        seed: of order and starts.

    Returns:
        One row per way and budget: model, epochs, flops (of the whole training), value (mean test R@10).
    """
    rows = []
    for model in models:
        own = model.model_copy(update={"texts": (text,)})
        for budget in epochs if model.kind in ("ape", "direct", "hyper_align") else epochs[:1]:
            settings = (model.training or training).model_copy(update={"epochs": budget})
            with tempfile.TemporaryDirectory() as folder:
                seed_everything(seed)
                outcome = connect(Task(zoo, own, settings, seed, Path(folder)))
            found = [pair_recall(zoo, *pair, connected) for pair, connected in outcome.pairs.items()]
            row = {"model": model.name, "epochs": budget if outcome.history else 0, "flops": outcome.flops}
            rows.append({**row, "value": sum(found) / len(found)})
    return pl.DataFrame(rows)


class _Code(nn.Module):
    """One learned code for a generator that is kept as it is."""

    def __init__(self, loss: HyperLoss, image: str, code: Float[Tensor, "1 C"]) -> None:
        super().__init__()
        self.code = nn.Parameter(code)
        self._of = (loss.module, loss.task, loss.text, image)  # in a tuple: not a part that is trained

    def connector(self) -> LinearMap:
        """Generate the connector of the last encoder."""
        generator = self._of[0]
        ((weight, bias),) = generator(self.code, [len(generator.outputs) - 1])
        return LinearMap(weight, bias)

    def loss(self, items: Tensor) -> Float[Tensor, ""]:
        _, task, text, image = self._of
        texts = task.text_batch(text, task.captions(items))
        mapped = functional.normalize(self.connector()(texts), dim=1)
        return paired_contrastive(mapped, task.image_batch(image, items), task.model.logit_scale)


def onboarding(
    zoo: Zoo, model: AlignModelSettings, training: Training, text: str, newcomer: str,
    epochs: Sequence[int] = (1, 4), seed: int = 0,
) -> pl.DataFrame:  # fmt: skip
    """Train a hypernetwork on all image encoders but one, then connect that one in several ways.

    Args:
        zoo: without controls: a copy of the newcomer among the others would give it away.
        model: a hypernetwork with mean codes.
        training: of the hypernetwork; with other epochs also of what is trained for the newcomer.
        text: the text encoder.
        newcomer: the image encoder that the hypernetwork never sees.
        epochs: of a connector of its own, and of a code for the hypernetwork as it is.
        seed: of order and starts.

    Returns:
        One row per way: newcomer, way, epochs and flops spent on the newcomer, value (test R@10).
    """
    others = [name for name in zoo.images if name != newcomer]
    widths = [zoo.images[name].width for name in (*others, newcomer)]
    rows: list[dict[str, Any]] = []

    def add(way: str, spent: int, flops: int, connected: LinearMap | Connected) -> None:
        connected = connected if isinstance(connected, Connected) else Connected(connected)
        value = pair_recall(zoo, text, newcomer, connected)
        rows.append({"newcomer": newcomer, "way": way, "epochs": spent, "flops": flops, "value": value})

    with tempfile.TemporaryDirectory() as folder:
        seed_everything(seed)
        task = Task(zoo, model, training, seed, Path(folder))
        generator = ConnectorGenerator(
            zoo.texts[text].width, widths, code_width=model.code_width, hidden=model.hidden
        )
        loss, last = HyperLoss(generator, task, text, others), [len(others)]
        fit(generator, loss, len(task.rows), training, _made(folder, "others"), seed=seed)
        generator.requires_grad_(False)
        code = generator.code(last, [task.mean(newcomer)])
        for spent in (0, *epochs):
            own = _Code(loss, newcomer, code.clone())
            flops = _fitted(own, own.loss, task, spent, _made(folder, f"code{spent}"))
            learned = f"code learned, {_said(spent)}" if spent else "never told of it"
            add(f"hypernetwork, {learned}", spent, flops, own.connector())
        for spent in epochs:
            bank = ConnectorBank(zoo.texts[text].width, widths[-1:])
            alone = BankLoss(bank, task, text, [newcomer])
            flops = _fitted(bank, alone, task, spent, _made(folder, f"own{spent}"))
            add(f"connector of its own, {_said(spent)}", spent, flops, LinearMap(*bank.linear(0)))
        for way, kind in (("closed form", "connector"), ("closed form of both sides", "cca")):
            flops, connected = _closed_later(task, kind, text, newcomer)
            add(way, 0, flops, connected)
    return pl.DataFrame(rows)


def _closed_later(task: Task, kind: str, text: str, newcomer: str) -> tuple[int, Connected]:
    """Return what a closed form takes more for one more image encoder, and what it gives for that one."""
    model = AlignModelSettings(
        name=kind, kind=kind, texts=(text,), strengths=task.model.strengths, kept=task.model.kept
    )
    fewer = {name: one for name, one in task.zoo.images.items() if name != newcomer}
    before, after = (
        connect(replace(task, zoo=replace(task.zoo, images=images), model=model))
        for images in (fewer, task.zoo.images)
    )
    return after.flops - before.flops, after.pairs[text, newcomer]


def _said(epochs: int) -> str:
    return f"{epochs} epoch{'s' * (epochs > 1)}"


def _made(folder: str, name: str) -> Path:
    path = Path(folder) / name
    path.mkdir()
    return path


def _fitted(
    module: nn.Module, loss: Callable[[Tensor], Tensor], task: Task, epochs: int, folder: Path
) -> int:
    """Train for some epochs, none if 0; return the operations."""
    if not epochs:
        return 0
    training = task.training.model_copy(update={"epochs": epochs})
    flops = training_flops(module, loss, len(task.rows), training)
    fit(module, loss, len(task.rows), training, folder, seed=task.seed)
    return flops
