"""The one training loop: seeds, schedule, log, checkpoint and exact resume. It knows no paper.

A run killed at any step goes on from its last checkpoint and ends with the same weights, bit for bit on one
kind of CPU: a checkpoint holds weights, optimiser state and random states, and the order of batches follows
from the seed and the epoch alone, so the step number is the data cursor.
"""

import hashlib
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from workbench.config import Settings
from workbench.errors import RunError
from workbench.files import write_atomic
from workbench.processes import average, average_gradients, leads

_log = logging.getLogger(__name__)

DrawnLoss = Callable[[int, torch.Generator], Tensor]
"""From how many items to draw, and from where, to a scalar."""
PARTS = 10  # entries in the history of a single epoch; several epochs have one each


class Training(Settings):
    """How a module is trained."""

    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0, description="items of the paper's kind, for Hyper-CL pairs")
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of all steps")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="how the learning rate goes down after the warm-up"
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    clip: float | None = Field(default=None, gt=0, description="largest gradient norm; null for none")

    def at_rate(self, learning_rate: float | None) -> "Training":
        """Return these settings with another learning rate; None leaves it."""
        return self if learning_rate is None else self.model_copy(update={"learning_rate": learning_rate})


class _Stop:
    """Remembers that a signal asked to stop, so that a step is never cut in two."""

    signal: int | None = None


@contextmanager
def _stop_between_steps() -> Iterator[_Stop]:
    """Hold back Ctrl-C and SIGTERM until the running step is done (only possible in the main thread)."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def remember(number: int, _: Any) -> None:
        stop.signal = number

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if stop.signal == signal.SIGTERM:
        raise SystemExit(143)


def seed_everything(seed: int) -> None:
    """Seed torch's global generators; the only place that does."""
    torch.manual_seed(seed)


@lru_cache(maxsize=1)  # asked for in every step of the epoch
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of ``count`` items in an epoch, from seed and epoch alone; not to be written to."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def fit(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    count: int,
    settings: Training,
    folder: Path,
    *,
    seed: int,
    checkpoint_seconds: float = 30.0,
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, int | float]]:
    """Train a module, going on from the checkpoint in ``folder`` if there is one.

    Args:
        module: trained in place; only parameters that require a gradient.
        loss: from the indices of a batch's items to a scalar.
        count: number of items; an epoch visits each once, in an order that depends on seed and epoch.
        settings: epochs, batch size, learning rate and so on.
        folder: private to this training; holds its checkpoint.
        seed: of the order; seed the module before building it.
        checkpoint_seconds: least time between two checkpoints; more if writing one takes long. 0: every step.
        rates: a learning rate of their own for parameters whose name starts so, for example "encoder.".

    Returns:
        One entry per epoch: epoch, loss (mean over its steps). A single epoch is told in tenths, 0.1 to 1.

    Raises:
        RunError: the loss is not finite; the last checkpoint is kept.
    """
    steps_per_epoch = math.ceil(count / settings.batch_size)
    total = steps_per_epoch * settings.epochs
    told = steps_per_epoch if settings.epochs > 1 else math.ceil(total / PARTS)
    optimiser = _optimiser(module, settings, rates or {})
    state = _Checkpoint(folder, module, optimiser)
    step, history, running = state.restore()
    saved, pause = time.monotonic(), checkpoint_seconds
    module.train()
    progress = {"desc": folder.name, "leave": False, "disable": not leads()}
    with _stop_between_steps() as stop, tqdm(total=total, initial=step, **progress) as bar:
        while step < total and stop.signal is None:
            epoch, place = divmod(step, steps_per_epoch)
            items = epoch_order(count, seed, epoch)[
                place * settings.batch_size : (place + 1) * settings.batch_size
            ]
            running += _step(module, loss(items), optimiser, settings, step, total)
            step += 1
            bar.update()
            if step % told == 0 or step == total:
                mean = running / ((step - 1) % told + 1)
                history.append({"epoch": step / steps_per_epoch, "loss": mean})
                running = 0.0
            due = stop.signal is not None or (step < total and time.monotonic() - saved > pause)
            if due and leads():
                began = time.monotonic()
                state.save(step, history, running)
                saved = time.monotonic()
                if checkpoint_seconds:
                    pause = max(checkpoint_seconds, 20 * (saved - began))  # at most 5 % of the time
    module.eval()
    return history


def fit_drawn(
    module: nn.Module,
    loss: DrawnLoss,
    steps: int,
    settings: Training,
    folder: Path,
    *,
    seed: int,
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, int | float]]:
    """Train on what is drawn anew for every step: tasks, episodes, points.

    The number of a step's first item seeds what is drawn, so a resumed training sees the same.

    Args:
        module: see :func:`fit`.
        loss: from what it draws to a scalar.
        steps: of an epoch; each draws ``settings.batch_size`` items.
        settings: see :func:`fit`.
        folder: private to this training; holds its checkpoint.
        seed: of the order and of what is drawn.
        rates: see :func:`fit`.

    Returns:
        What :func:`fit` returns.
    """

    def of_items(items: Tensor) -> Tensor:
        return loss(len(items), torch.Generator().manual_seed(int(items[0]) * 1009 + seed))

    return fit(module, of_items, steps * settings.batch_size, settings, folder, seed=seed, rates=rates)


def _optimiser(module: nn.Module, settings: Training, rates: Mapping[str, float]) -> torch.optim.Optimizer:
    """Group parameters by their learning rate; "peak" is what warm-up climbs to."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            own = [rate for start, rate in rates.items() if name.startswith(start)]
            groups.setdefault(own[0] if own else settings.learning_rate, []).append(parameter)
    members = [{"params": params, "lr": rate, "peak": rate} for rate, params in groups.items()]
    return torch.optim.AdamW(members, weight_decay=settings.weight_decay, betas=settings.betas, fused=True)


def rate_factor(settings: Training, step: int, total: int) -> float:
    """Return which share of the learning rate a step has: up to 1 over the warm-up, then down.

    A warm-up that is no whole number of steps lets "linear" begin above 1, by less than one step's fall.
    """
    warm = settings.warmup * total
    if step + 1 <= warm:
        return (step + 1) / warm
    left = (total - step) / max(total - warm, 1)
    if settings.schedule == "constant":
        return 1.0
    return left if settings.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


def _step(
    module: nn.Module,
    value: Tensor,
    optimiser: torch.optim.Optimizer,
    settings: Training,
    step: int,
    total: int,
) -> float:
    """Make one optimiser step at its learning rate; return the loss."""
    mean = average(value)
    if not torch.isfinite(mean):
        raise RunError(
            f"the loss of {type(module).__name__} is {mean.item()} at step {step + 1} of {total} with "
            f"learning rate {settings.learning_rate:g}; lower training.learning_rate or set training.clip"
        )
    optimiser.zero_grad(set_to_none=True)
    value.backward()
    average_gradients(module)
    if settings.clip is not None:
        nn.utils.clip_grad_norm_(
            [p for group in optimiser.param_groups for p in group["params"]], settings.clip
        )
    factor = rate_factor(settings, step, total)
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * factor
    optimiser.step()
    return float(mean)


class _Checkpoint:
    """One file with all a training needs to go on, written whole and checked by hash before use."""

    def __init__(self, folder: Path, module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self.path = folder / "checkpoint.safetensors"
        self.module, self.optimiser = module, optimiser

    def save(self, step: int, history: list[dict[str, int | float]], running: float) -> None:
        """Write module, optimiser and random states; the hash of all that follows comes first."""
        tensors = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        raw = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        header = json.dumps({"step": step, "history": history, "running": running}).encode()
        body = header + b"\n" + raw
        write_atomic(self.path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)

    def restore(self) -> tuple[int, list[dict[str, int | float]], float]:
        """Bring everything back to the last checkpoint; without one, start at step 0."""
        if not self.path.is_file():
            return 0, [], 0.0
        expected, _, body = self.path.read_bytes().partition(b"\n")
        try:
            if hashlib.sha256(body).hexdigest().encode() != expected:
                raise ValueError("its content does not match its hash")
            first, _, raw = body.partition(b"\n")
            header, tensors = json.loads(first), load(raw)
        except (ValueError, KeyError, SafetensorError) as problem:
            _log.warning("checkpoint %s is damaged (%s); training starts again", self.path.name, problem)
            os.replace(self.path, self.path.with_suffix(".damaged"))
            return 0, [], 0.0
        self.module.load_state_dict(
            {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("module.")}
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
        content = self.optimiser.state_dict()
        self.optimiser.load_state_dict({"state": state, "param_groups": content["param_groups"]})
        for parameter, values in self.optimiser.state.items():
            for key, value in values.items():
                if value.shape == parameter.shape:
                    # Laid out as the parameter is, say channels last: the fused step walks both side by side.
                    values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        return header["step"], header["history"], header["running"]
