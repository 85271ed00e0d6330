"""Training in a child process, started from a dashboard: once per output folder, watched by all who look."""

import atexit
import re
import subprocess
import sys
import threading
from collections import deque
from functools import cache
from pathlib import Path

from workbench.config import recipe_names
from workbench.reproduce import recipes_of

LINES = 6  # kept of what the process says


@cache
def first_recipes() -> dict[str, list[str]]:
    """Return what the first page offers to train: small models in seconds, or the embedded set in minutes."""
    embedded = recipes_of("embedded")
    small = [f"{name}_tiny" for name in embedded]
    return {"small": [name for name in small if name in recipe_names()], "all": embedded}


class Background:
    """The training that runs over an output folder, if any."""

    def __init__(self, out: Path, device: str = "cpu") -> None:
        """Prepare; nothing is started.

        Args:
            out: output folder of the runs.
            device: where they are trained, as torch names devices.
        """
        self.out, self.device, self.recipes = out, device, []
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: deque[str] = deque(maxlen=LINES)
        atexit.register(self.cancel)

    def start(self, recipes: list[str]) -> bool:
        """Train recipes that are not done yet; a second call while one runs does nothing.

        Returns:
            Whether this call started it.
        """
        with self._lock:
            if self.running:
                return False
            self.recipes = list(recipes)
            self._lines.clear()
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
            return True

    def command(self) -> list[str]:
        """Return the command line of the child process."""
        workbench = [sys.executable, "-m", "workbench", "reproduce", *self.recipes]
        return [*workbench, "--out", str(self.out), "--device", self.device, "--no-notebooks"]

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Keep the last lines; a progress bar writes over its own line."""
        rest = ""
        while chunk := process.stdout.read1(4096):
            *whole, rest = re.split(r"[\r\n]+", rest + chunk.decode("utf-8", "replace"))
            for line in filter(None, (re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", one).strip() for one in whole)):
                if self._lines and line.partition(":")[0] == self._lines[-1].partition(":")[0]:
                    self._lines.pop()
                self._lines.append(line[:300])
        process.wait()

    @property
    def running(self) -> bool:
        """Whether the process is at work."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Exit code of the process; None if none was started or it runs."""
        return None if self._process is None else self._process.poll()

    def said(self) -> list[str]:
        """Return the last lines of the process."""
        return list(self._lines)

    def cancel(self) -> None:
        """Stop the process; the next start goes on from its last checkpoint."""
        if self.running:
            self._process.terminate()


@cache
def background(out: Path, device: str = "cpu") -> Background:
    """Return the one training of a server process over an output folder."""
    return Background(out, device)
