"""Serves the dashboards: one page each, and a first page that lists them."""

import ast
import ipaddress
import os
import re
import secrets
from functools import cache
from pathlib import Path
from typing import Any

from workbench.errors import RunError
from workbench.runs import check_device

APPS = Path(__file__).parents[1] / "apps"
LOGIN = Path(__file__).parents[1] / "templates" / "login.html"
UPLOAD_MIB = 8  # a message from a browser; larger ones close its connection
SHORTEST = 12  # characters of a password; there is no limit on guesses per second
_ORIGIN = re.compile(r"[A-Za-z0-9.\-]+:\d{1,5}")


def app_paths() -> dict[str, str]:
    """Return the entry script of every dashboard by its name."""
    return {path.stem: str(path) for path in sorted(APPS.glob("*.py"))}


@cache
def app_about(name: str) -> tuple[str, str]:
    """Return a dashboard's label and one line on it: what its script's docstring says after the colon."""
    docstring = ast.get_docstring(ast.parse((APPS / f"{name}.py").read_text("utf-8"))) or ""
    line = " ".join(docstring.partition(": ")[2].split())
    return name.replace("_", " ").capitalize(), line[:1].upper() + line[1:]


def serve_apps(
    out: Path,
    port: int,
    address: str,
    origins: list[str] | None = None,
    password_file: Path | None = None,
    device: str = "cpu",
) -> None:
    """Serve until stopped.

    Raises:
        RunError: an address that others can reach, without a login and the exact names it is reached by; a
            device that is not here.
    """
    check_device(device)
    options = login_options(address, port, origins or [], password_file)
    import panel as pn

    os.environ.update(WORKBENCH_OUT=str(out), WORKBENCH_DEVICE=device)
    try:
        pn.serve(
            pages(), port=port, address=address, show=False, title="Workbench", start=True,
            websocket_max_message_size=UPLOAD_MIB * 2**20, **options,
        )  # fmt: skip
    except OSError as problem:
        raise RunError(
            f"cannot listen on {address}:{port} ({problem.strerror}); choose another --port"
        ) from None


def pages() -> dict[str, str]:
    """Return every dashboard's script by its address; the index is the first page, too."""
    paths = app_paths()
    return {**({"/": paths["index"]} if "index" in paths else {}), **paths}


def login_options(address: str, port: int, origins: list[str], password_file: Path | None) -> dict[str, Any]:
    """Return what the server has to be told about who may come in.

    Args:
        address: it listens on.
        port: it listens on.
        origins: HOST:PORT as it stands in a reader's address bar; no patterns.
        password_file: its first line is the password of the user "workbench".

    Raises:
        RunError: others can reach the address, and the login or the origins are missing or unusable.
    """
    unusable = [origin for origin in origins if not _ORIGIN.fullmatch(origin)]
    if unusable:
        raise RunError(
            f"--origin {unusable[0]!r} is not exact; give HOST:PORT as in the address bar, without * or http://"
        )
    if address != "localhost" and not _loopback(address) and (password_file is None or not origins):
        raise RunError(
            f"{address!r} can be reached by others, so these pages need a login and exact origins; add "
            "--password-file FILE and --origin HOST:PORT, or use 127.0.0.1"
        )
    if not origins:
        origins = [f"{name}:{port}" for name in ("localhost", "127.0.0.1") if port]
    options: dict[str, Any] = {"websocket_origin": origins} if origins else {}
    if password_file is None:
        return options
    return {
        **options,
        "basic_auth": {"workbench": _password(password_file)},
        "login_template": str(LOGIN),  # Panel's own asks another machine for its logo
        "cookie_secret": secrets.token_urlsafe(32),  # a restart logs everybody out
    }


def _password(path: Path) -> str:
    """Read a password.

    Raises:
        RunError: no such file, others can read it, or its first line is short enough to be guessed.
    """
    try:
        found = path.read_text("utf-8").splitlines()[:1]
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as problem:
        raise RunError(f"the password file {path} cannot be read ({problem})") from None
    if mode & 0o077:
        raise RunError(f"the password file {path} can be read by others; run: chmod 600 {path}")
    if not found or len(found[0].strip()) < SHORTEST:
        raise RunError(f"the first line of {path} needs a password of at least {SHORTEST} characters")
    return found[0].strip()


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
