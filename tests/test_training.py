"""The training loop: killed anywhere, it ends with the same weights, bit for bit."""

import hashlib
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from workbench import files
from workbench.errors import RunError
from workbench.training import Training, epoch_order, fit, fit_drawn, rate_factor, seed_everything

ITEMS, STEPS = 23, 20  # 5 batches an epoch, the last one of 3 items, and 4 epochs
SETTINGS = {"epochs": 4, "batch_size": 5, "learning_rate": 0.05, "weight_decay": 0.01, "clip": 1.0}
NEVER = 1e9


def train(
    folder: Path, each: Callable[[], None] = lambda: None, *, seed: int = 0, every: float = 0.0
) -> tuple[str, list[dict[str, float]]]:
    """Train a small network with dropout; ``each`` is called before every loss."""
    draw = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(ITEMS, 6, generator=draw), torch.randn(ITEMS, 1, generator=draw)
    seed_everything(seed)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))

    def loss(items: torch.Tensor) -> torch.Tensor:
        each()
        return (module(inputs[items]) - targets[items]).square().mean()

    history = fit(module, loss, ITEMS, Training(**SETTINGS), folder, seed=seed, checkpoint_seconds=every)
    weights = b"".join(tensor.numpy().tobytes() for tensor in module.state_dict().values())
    return hashlib.sha256(weights).hexdigest(), history


# --- killed from outside and inside: run as a script, in processes of their own -----------------------------


def at(call: int, number: int) -> Callable[[], None]:
    """Send this process a signal at the given call."""
    calls = iter(range(1, 10**6))
    return lambda: os.kill(os.getpid(), number) if next(calls) == call else None


def kill_while_saving(save: int, moment: str) -> None:
    """Make the given save of this process its last: half written, or just before or after the rename."""
    saves, replace, fdopen = iter(range(1, 10**6)), os.replace, os.fdopen

    def half_written(handle: int, mode: str):
        if next(saves) == save:
            os.write(handle, b"0123456789")
            os.kill(os.getpid(), signal.SIGKILL)
        return fdopen(handle, mode)

    def renamed(source: str, target: Path) -> None:
        last = next(saves) == save
        if last and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    if moment == "half":
        files.os.fdopen = half_written
    else:
        files.os.replace = renamed


def in_processes(folder: Path, plans: list[Callable[[Path], Callable[[], None]]]) -> dict:
    """Run the training once per plan, each in a new process and each going on from the one before."""
    folder.mkdir()
    ends = []
    for plan in plans:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                each = plan(folder)
                with open(folder / "calls", "ab", buffering=0) as calls:
                    every = NEVER if folder.name.startswith("sigterm") else 0.0
                    found = train(folder, lambda each=each: (calls.write(b"."), each()), every=every)
                (folder / "found.json").write_text(json.dumps(found))
                code = 0
            except SystemExit as stop:
                code = stop.code
            finally:
                os._exit(code)
        if plan is plan_outside:
            time.sleep(random.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    weights, history = json.loads((folder / "found.json").read_text())
    return {
        "weights": weights,
        "history": history,
        "ends": ends,
        "calls": (folder / "calls").stat().st_size,
        "left": sorted(path.name for path in folder.glob("checkpoint*")),
    }


def plan_outside(folder: Path) -> Callable[[], None]:
    """A plan for a process that is killed by its parent; slow enough to be caught."""
    return lambda: time.sleep(0.002)


def plan_whole(folder: Path) -> Callable[[], None]:
    return lambda: None


def plan_signal(call: int, number: int) -> Callable[[Path], Callable[[], None]]:
    return lambda folder: at(call, number)


def plan_saving(save: int, moment: str) -> Callable[[Path], Callable[[], None]]:
    def plan(folder: Path) -> Callable[[], None]:
        kill_while_saving(save, moment)
        return lambda: None

    return plan


def main(folder: Path) -> None:
    import torch._dynamo  # optimisers import it at their first step: once here, not in every process

    torch.set_num_threads(1)
    kills = [plan_signal(call, signal.SIGKILL) for call in (1, 4, 1, 6, 2, 3)]
    saves = [plan_saving(save, moment) for save, moment in [(3, "before"), (2, "half"), (4, "before")]]
    results = {
        "whole": in_processes(folder / "whole", [plan_whole]),
        "kills": in_processes(folder / "kills", [*kills, plan_whole]),
        "saves": in_processes(folder / "saves", [*saves, plan_whole]),
        "renamed": in_processes(folder / "renamed", [plan_saving(7, "after"), plan_whole]),
        "outside": in_processes(folder / "outside", [plan_outside] * 8 + [plan_whole]),
        "sigterm": in_processes(folder / "sigterm", [plan_signal(7, signal.SIGTERM), plan_whole]),
        "sigterm at the end": in_processes(
            folder / "sigterm at the end", [plan_signal(STEPS, signal.SIGTERM), plan_whole]
        ),
    }
    print(json.dumps(results))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.exit()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """One interpreter that forks a process per attempt, so that torch is imported once."""
    one = {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(files.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, __file__, tmp_path_factory.mktemp("trainings")],
        env={**os.environ, **one},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# What each series of processes costs: a step that was not saved is computed again, and no other.
@pytest.mark.parametrize(
    ("series", "ends", "calls"),
    [
        ("kills", [-9] * 6 + [0], STEPS + 6),
        ("saves", [-9] * 3 + [0], STEPS + 3),
        ("renamed", [-9, 0], STEPS),
        ("sigterm", [143, 0], STEPS),
        ("sigterm at the end", [143, 0], STEPS),
    ],
)
def test_a_killed_training_goes_on_and_ends_with_the_same_bits(processes, series, ends, calls):
    found, whole = processes[series], processes["whole"]
    assert whole["calls"] == STEPS
    assert found["ends"] == ends
    assert found["calls"] == calls
    assert found["weights"] == whole["weights"]
    assert found["history"] == whole["history"]
    assert found["left"] == ["checkpoint.safetensors"]


def test_a_training_killed_from_outside_at_any_moment_ends_with_the_same_bits(processes):
    found, whole = processes["outside"], processes["whole"]
    assert found["ends"][-1] == 0
    assert found["weights"] == whole["weights"]
    assert found["history"] == whole["history"]


# --- within one process -------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands for whatever ends a training from inside its loss."""


def interrupted_at(folder: Path, call: int) -> Path:
    """Leave the checkpoint of a training that ended in the given call of its loss."""
    calls = iter(range(1, 10**6))

    def each() -> None:
        if next(calls) == call:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(folder, each)
    return folder / "checkpoint.safetensors"


def test_ctrl_c_waits_for_the_step_saves_and_gives_the_handlers_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    calls = []
    with pytest.raises(KeyboardInterrupt):
        train(
            tmp_path,
            lambda: (calls.append(1), os.kill(os.getpid(), signal.SIGINT) if len(calls) == 8 else None),
            every=NEVER,
        )
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    found = train(tmp_path, lambda: calls.append(1), every=NEVER)
    assert len(calls) == STEPS
    assert found == train(tmp_path / "whole", every=NEVER)


def test_a_training_outside_the_main_thread_works(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(tmp_path)))
    thread.start()
    thread.join()
    assert len(found[0][1]) == SETTINGS["epochs"]


def test_no_checkpoint_is_written_before_its_time(tmp_path):
    train(tmp_path, every=NEVER)
    assert list(tmp_path.iterdir()) == []


def damages(raw: bytes) -> dict[str, bytes]:
    """Ways in which a file of this length can be cut, or one of its bytes changed."""
    found = {f"cut to {length}": raw[:length] for length in (0, 1, 40, 200, len(raw) // 2, len(raw) - 1)}
    for place in [*range(0, 200, 9), *range(200, len(raw), 601), len(raw) - 1]:
        found[f"flipped at {place}"] = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
    return found


def test_a_cut_or_changed_checkpoint_is_noticed_wherever_the_damage_is(tmp_path, caplog):
    whole = train(tmp_path / "whole", every=NEVER)
    raw = interrupted_at(tmp_path / "checkpoint", 9).read_bytes()
    for number, (how, damaged) in enumerate(damages(raw).items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "checkpoint.safetensors").write_bytes(damaged)
        calls = []
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = train(folder, lambda calls=calls: calls.append(1), every=NEVER)
        assert len(calls) == STEPS, f"{how}: not noticed"
        assert "is damaged" in caplog.text, how
        assert "training starts again" in caplog.text, how
        assert (folder / "checkpoint.damaged").read_bytes() == damaged, how
        assert found == whole, how


def test_a_whole_checkpoint_is_used_without_a_warning(tmp_path, caplog):
    interrupted_at(tmp_path, 9)
    calls = []
    with caplog.at_level(logging.WARNING):
        found = train(tmp_path, lambda: calls.append(1), every=NEVER)
    assert len(calls) == STEPS - 8
    assert caplog.text == ""
    assert found == train(tmp_path / "whole", every=NEVER)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    first, again, other = (train(tmp_path / f"{n}", seed=seed) for n, seed in enumerate((3, 3, 4)))
    assert first == again
    assert first[0] != other[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_names_step_and_learning_rate_and_keeps_the_checkpoint(tmp_path, value):
    module = nn.Linear(2, 1)
    calls = []

    def loss(items: torch.Tensor) -> torch.Tensor:
        calls.append(module.weight.detach().clone())
        return module(torch.ones(1, 2)).sum() * (value if len(calls) == 3 else 1.0)

    settings = Training(epochs=2, batch_size=2, learning_rate=0.025)
    with pytest.raises(RunError, match=r"of Linear is -?(nan|inf) at step 3 of 8 with learning rate 0\.025"):
        fit(module, loss, 8, settings, tmp_path, seed=0, checkpoint_seconds=0.0)
    assert torch.equal(module.weight, calls[-1])  # the bad step changed nothing
    assert (tmp_path / "checkpoint.safetensors").is_file()


def one_weight(
    folder: Path, slope: Callable[[int], float], settings: Training, count: int = 10
) -> list[float]:
    """Train one number, started at 1, with the given gradient at each step; return it before each step."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    seen = []

    def loss(items: torch.Tensor) -> torch.Tensor:
        seen.append(module.weight.item())
        return module.weight.sum() * slope(len(seen) - 1)

    fit(module, loss, count, settings, folder, seed=0)
    return [*seen, module.weight.item()]


def test_the_learning_rate_rises_linearly_then_falls_linearly_to_zero(tmp_path):
    settings = Training(epochs=2, batch_size=2, learning_rate=0.01, warmup=0.4)
    seen = one_weight(tmp_path, lambda step: 1.0, settings)
    # With a constant gradient, AdamW moves by the learning rate. 10 steps, 4 of warm-up, then 6 falling.
    shares = [1 / 4, 2 / 4, 3 / 4, 4 / 4, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    moves = [before - after for before, after in zip(seen, seen[1:], strict=False)]
    # Single precision near 1.
    assert moves == pytest.approx([0.01 * share for share in shares], abs=1e-6)


def test_without_warm_up_the_first_step_has_the_full_learning_rate(tmp_path):
    seen = one_weight(
        tmp_path, lambda step: 1.0, Training(epochs=1, batch_size=2, learning_rate=0.01, warmup=0.0)
    )
    # 5 steps: 5/5 of the rate, then 4/5. Single precision near 1.
    assert seen[:3] == pytest.approx([1.0, 0.99, 0.982], abs=1e-6)


def rate(schedule: str, step: int, total: int = 20, warmup: float = 0.2) -> float:
    common = {"epochs": 1, "batch_size": 1, "learning_rate": 1.0, "warmup": warmup}
    return rate_factor(Training(**common, schedule=schedule), step, total)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_every_schedule_climbs_alike_over_the_warm_up(schedule):
    # 20 steps, 4 of warm-up.
    assert [rate(schedule, step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate(schedule, 4) == 1.0
    assert rate(schedule, 0, warmup=0.0) == 1.0
    assert rate(schedule, 0, total=1) == 1.0


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [
        ("linear", 0.5, 1 / 16),
        # (1 + cos(pi * 8 / 16)) / 2 and (1 + cos(pi * 15 / 16)) / 2
        ("cosine", 0.5, (1 + math.cos(15 / 16 * math.pi)) / 2),
        ("constant", 1.0, 1.0),
    ],
)
def test_after_the_warm_up_a_schedule_goes_its_own_way_down(schedule, middle, last):
    # 16 steps follow the warm-up: step 12 is the ninth of them, and 8 of 16 are done.
    assert rate(schedule, 12) == pytest.approx(middle)
    assert rate(schedule, 19) == pytest.approx(last)
    falling = [rate(schedule, step) for step in range(4, 20)]
    assert falling == sorted(falling, reverse=True)
    # A quarter and three quarters down: the cosine leaves its start and nears its end more slowly.
    expected = {"linear": (0.75, 0.25), "cosine": (0.853553, 0.146447), "constant": (1.0, 1.0)}[schedule]
    assert (rate(schedule, 8), rate(schedule, 16)) == pytest.approx(expected, abs=1e-6)


def test_a_warm_up_of_a_broken_number_of_steps_ends_less_than_a_step_above_the_rate():
    # 1.5 of 15 steps: 2/3 of the rate, then 14 of 13.5.
    assert [rate("linear", step, 15, 0.1) for step in (0, 1, 2)] == pytest.approx(
        [1 / 1.5, 14 / 13.5, 13 / 13.5]
    )
    assert all(rate("cosine", step, 15, 0.1) <= 1 for step in range(15))


def test_a_schedule_is_what_training_follows(tmp_path):
    common = {"epochs": 2, "batch_size": 2, "learning_rate": 0.01, "warmup": 0.4}
    for schedule in ("cosine", "constant"):
        settings = Training(**common, schedule=schedule)
        seen = one_weight(tmp_path / schedule, lambda step: 1.0, settings)
        moves = [before - after for before, after in zip(seen, seen[1:], strict=False)]
        # With a constant gradient, AdamW moves by the learning rate; single precision near 1.
        expected = [0.01 * rate_factor(settings, step, 10) for step in range(10)]
        assert moves == pytest.approx(expected, abs=1e-6)


def test_what_is_not_said_is_a_linear_fall_and_adams_own_averages():
    settings = Training(epochs=1, batch_size=1, learning_rate=0.1)
    assert (settings.schedule, settings.betas, settings.warmup) == ("linear", (0.9, 0.999), 0.1)


def test_averages_of_gradients_and_their_squares_decay_as_set(tmp_path):
    common = {"epochs": 1, "batch_size": 5, "learning_rate": 0.01, "warmup": 0.0, "schedule": "constant"}
    slopes = (1.0, 3.0)
    plain = one_weight(tmp_path / "plain", lambda step: slopes[step], Training(**common))
    forgetful = one_weight(
        tmp_path / "forgetful", lambda step: slopes[step], Training(**common, betas=(0.0, 0.5))
    )
    # The first step is one rate. Plain: mean (0.09 * 1 + 0.1 * 3) / 0.19 = 2.0526, mean square (0.000999 +
    # 0.009) / 0.001999 = 5.0020, a step of 2.0526 / 2.2365. Forgetful: 3 / sqrt((0.25 + 0.5 * 9) / 0.75).
    assert plain[-1] == pytest.approx(1 - 0.01 - 0.01 * 0.91778, abs=1e-6)
    assert forgetful[-1] == pytest.approx(1 - 0.01 - 0.01 * 3 / (4.75 / 0.75) ** 0.5, abs=1e-6)


@pytest.mark.parametrize(
    "change", [{"schedule": "step"}, {"betas": [0.9, 1.0]}, {"betas": [-0.1, 0.9]}, {"betas": [0.9]}]
)
def test_schedules_and_averages_that_there_are_not_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Training.model_validate_json(json.dumps({**SETTINGS, **change}))


def test_averages_are_read_from_a_recipe():
    settings = Training.model_validate_json(
        json.dumps({**SETTINGS, "betas": [0.9, 0.95], "schedule": "cosine"})
    )
    assert settings.betas == (0.9, 0.95)


def test_weight_decay_shrinks_a_weight_without_gradient(tmp_path):
    settings = Training(epochs=1, batch_size=5, learning_rate=0.1, weight_decay=0.5, warmup=0.0)
    # 2 steps at rates 0.1 and 0.05: (1 - 0.1 * 0.5) * (1 - 0.05 * 0.5). Single precision.
    assert one_weight(tmp_path, lambda step: 0.0, settings)[-1] == pytest.approx(0.95 * 0.975, rel=1e-6)


def test_clipping_bounds_the_gradient(tmp_path):
    common = {"epochs": 1, "batch_size": 5, "learning_rate": 0.01, "warmup": 0.0}
    slopes = (100.0, 1.0)
    clipped = one_weight(tmp_path, lambda step: slopes[step], Training(**common, clip=1.0))
    free = one_weight(tmp_path, lambda step: slopes[step], Training(**common))
    # Steps at rates 0.01 and 0.005. Clipped to 1 and 1, AdamW moves by the rate both times. Free, the second
    # is (0.09 * 100 + 0.1 * 1) / 0.19 over sqrt((0.000999 * 1e4 + 0.001) / 0.001999) = 0.6774 of it.
    assert clipped[-1] == pytest.approx(1 - 0.01 - 0.005, abs=1e-6)
    assert free[-1] == pytest.approx(1 - 0.01 - 0.005 * 0.6774, abs=2e-6)


def test_every_epoch_visits_each_item_once_in_an_order_of_its_own(tmp_path):
    module, seen = nn.Linear(1, 1), []

    def loss(items: torch.Tensor) -> torch.Tensor:
        seen.append(items.tolist())
        return module(torch.ones(1, 1)).sum()

    fit(module, loss, 11, Training(epochs=3, batch_size=4, learning_rate=0.01), tmp_path, seed=0)
    assert [len(items) for items in seen] == [4, 4, 3] * 3
    epochs = [sum(seen[start : start + 3], []) for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_depends_on_seed_and_epoch_alone():
    torch.manual_seed(1)
    one = epoch_order(30, 5, 2)
    epoch_order.cache_clear()
    torch.manual_seed(2)
    assert torch.equal(one, epoch_order(30, 5, 2))
    assert not torch.equal(one, epoch_order(30, 5, 3))
    assert not torch.equal(one, epoch_order(30, 6, 2))


def test_history_holds_the_mean_loss_of_every_epoch(tmp_path):
    module, values = nn.Linear(1, 1), iter([1.0, 2.0, 6.0, 10.0, 20.0, 30.0])

    def loss(items: torch.Tensor) -> torch.Tensor:
        return module.weight.sum() * 0 + next(values)

    history = fit(module, loss, 6, Training(epochs=2, batch_size=2, learning_rate=0.01), tmp_path, seed=0)
    assert history == [{"epoch": 1, "loss": 3.0}, {"epoch": 2, "loss": 20.0}]


def test_a_single_epoch_is_told_in_tenths(tmp_path):
    module, values = nn.Linear(1, 1), iter(range(25))

    def loss(items: torch.Tensor) -> torch.Tensor:
        return module.weight.sum() * 0 + next(values)

    history = fit(module, loss, 25, Training(epochs=1, batch_size=1, learning_rate=0.01), tmp_path, seed=0)
    # 25 steps in parts of 3, the ninth of one step: the means of 0 1 2, of 3 4 5, ..., of 24.
    assert [one["loss"] for one in history] == [1, 4, 7, 10, 13, 16, 19, 22, 24]
    assert [one["epoch"] for one in history] == [0.12, 0.24, 0.36, 0.48, 0.6, 0.72, 0.84, 0.96, 1]


def test_every_step_draws_anew_from_its_first_item_and_so_the_same_when_it_is_made_again(tmp_path):
    settings = Training(epochs=1, batch_size=3, learning_rate=0.01)

    def train(folder: str, seed: int) -> list[tuple[int, float]]:
        module, seen = nn.Linear(1, 1), []

        def loss(count: int, draw: torch.Generator) -> torch.Tensor:
            seen.append((count, float(torch.rand(1, generator=draw))))
            return module.weight.sum()

        fit_drawn(module, loss, 5, settings, tmp_path / folder, seed=seed)
        return seen

    drawn = train("one", 0)
    assert [count for count, _ in drawn] == [3] * 5
    assert len({value for _, value in drawn}) == 5
    assert drawn == train("two", 0) != train("three", 1)
    first = [int(epoch_order(15, 0, 0)[3 * step]) for step in range(5)]
    seeds = [torch.Generator().manual_seed(item * 1009) for item in first]
    assert [value for _, value in drawn] == [float(torch.rand(1, generator=seed)) for seed in seeds]


def test_frozen_parameters_stay_and_dropout_is_on_in_training_only(tmp_path):
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Linear(2, 1))
    module[0].requires_grad_(False)
    start = [parameter.detach().clone() for parameter in module.parameters()]
    modes = []

    def loss(items: torch.Tensor) -> torch.Tensor:
        modes.append(module.training)
        return module(torch.ones(4, 2)).square().mean()

    module.eval()
    fit(module, loss, 4, Training(epochs=2, batch_size=2, learning_rate=0.01), tmp_path, seed=0)
    changed = [not torch.equal(*both) for both in zip(start, module.parameters(), strict=True)]
    assert changed == [False, False, True, True]
    assert modes == [True] * 4
    assert not module.training


@pytest.mark.parametrize(
    "change", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"warmup": 1.0}, {"clip": 0.0}]
)
def test_settings_that_cannot_train_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Training(**{**SETTINGS, **change})
