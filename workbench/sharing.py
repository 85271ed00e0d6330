"""The trainings of one run shared by several processes of this machine: who finishes one takes the next.

Small networks keep one core busy and no more, so two trainings at once take less time than one after the
other. Every training has a folder, and whoever holds the lock beside the folder is at it. A
process that ends for any reason gives its lock back, and the first process, which writes the run, does what
is left and waits for what is not done yet: it needs nobody's help, and an error is its own.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout

from workbench.processes import world

Job, Result = TypeVar("Job"), TypeVar("Result")
START_AFTER = 3.0  # seconds of training before others are started: a small run is done by then


class Taken(Exception):
    """Another process is at this training."""


class Enough(Exception):
    """Nothing is left to take; said in a process that only helps."""


@dataclass
class Team:
    """The processes that share a run.

    Attributes:
        size: their number.
        request: how :func:`workbench.runs.run_recipe` is called in the others.
        helps: whether this process is one of the others.
        patient: whether it waits for a training that another is at.
    """

    size: int = 1
    request: dict[str, Any] | None = None
    helps: bool = False
    patient: bool = False


_TEAM: ContextVar[Team | None] = ContextVar("team", default=None)


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_each(size: int) -> int:
    """Number of threads that each process of a team computes on."""
    return max(1, cores() // size)


@contextmanager
def shared(size: int, request: dict[str, Any]) -> Iterator[None]:
    """Share the trainings of the run that is computed inside with other processes.

    Args:
        size: of the team, this process included; 1 starts nobody, and so does an accelerator, which small
            trainings fill by themselves, or several processes that train together.
        request: arguments of :func:`workbench.runs.run_recipe` that lead to the same run.
    """
    alone = request.get("device", "cpu") != "cpu" or world() > 1
    token = _TEAM.set(Team(1 if alone else size, request))
    try:
        yield
    finally:
        _TEAM.reset(token)


def workers() -> int:
    """Number of processes that share the trainings of the run that is computed."""
    team = _TEAM.get()
    return 1 if team is None else team.size


def helps() -> bool:
    """Whether this process only helps another one."""
    team = _TEAM.get()
    return team is not None and team.helps


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a training, so that no other process starts it.

    Args:
        folder: of the training; the lock lies beside it.

    Raises:
        Taken: another process holds it, and this one does not wait.
    """
    team = _TEAM.get()
    if team is None or (team.size == 1 and not team.helps):
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=-1 if team.patient else 0)
    except Timeout:
        raise Taken(folder.name) from None
    try:
        yield
    finally:
        lock.release()


def in_turn(jobs: list[Job], do: Callable[[Job], Result]) -> Iterator[tuple[int, Result]]:
    """Do jobs in their order, and those that another process is at in the end.

    Args:
        jobs: the same in every process of the team.
        do: one of them; raises :class:`Taken`.

    Yields:
        The place of a job in the list, and its result.

    Raises:
        Enough: in a process that helps, when nothing is left to take.
    """
    team, waiting = _TEAM.get() or Team(), []
    with _started(team), _threads(team):
        for place, job in enumerate(jobs):
            if team.helps and not parent_process().is_alive():
                break
            try:
                result = do(job)
            except Taken:
                waiting.append(place)
                continue
            yield place, result
        if team.helps:
            raise Enough
        team.patient = True
        for place in waiting:
            yield place, do(jobs[place])


@contextmanager
def _threads(team: Team) -> Iterator[None]:
    """Give each process of a team its part of the cores."""
    before = torch.get_num_threads()
    if team.size > 1:
        torch.set_num_threads(threads_each(team.size))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _started(team: Team) -> Iterator[None]:
    """Start the others after a while; stop them when there is nothing left for them."""
    # Spawned, not forked: a forked process inherits torch's thread pools in a state it cannot use.
    context = get_context("spawn")
    others = [
        context.Process(target=help_with, args=(team.request, team.size), daemon=True)
        for _ in range(team.size - 1 if not team.helps else 0)
    ]
    timers = [threading.Timer(START_AFTER, other.start) for other in others]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
            timer.join()
        for other in others:
            if other.pid is not None:
                other.terminate()
                other.join()


def help_with(request: dict[str, Any], size: int) -> None:
    """Take trainings of a run that another process computes until none is left.

    Args:
        request: arguments of :func:`workbench.runs.run_recipe`.
        size: of the team.
    """
    from tqdm import tqdm

    from workbench.runs import run_recipe

    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and leaks when this one is stopped
    _TEAM.set(Team(size, request, helps=True))
    # The bar and the messages are the first process's.
    with open(os.devnull, "w", encoding="utf-8") as quiet, redirect_stderr(quiet), suppress(Enough):
        run_recipe(**request)
