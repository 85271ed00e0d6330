"""Serves the dashboards: one page each, and a first page that lists them."""

import ipaddress
import os
from pathlib import Path

from workbench.errors import RunError

APPS = Path(__file__).parents[1] / "apps"


def app_paths() -> dict[str, str]:
    """Return the entry script of every dashboard by its name."""
    return {path.stem: str(path) for path in sorted(APPS.glob("*.py"))}


def serve_apps(out: Path, port: int, address: str) -> None:
    """Serve until stopped.

    Raises:
        RunError: an address that others can reach; there, a login has to stand before the pages.
    """
    if address != "localhost" and not _loopback(address):
        raise RunError(
            f"{address} can be reached by others, and these pages have no login; use 127.0.0.1, or start "
            "panel serve workbench/apps/*.py yourself with --oauth-provider and --cookie-secret"
        )
    import panel as pn

    os.environ["WORKBENCH_OUT"] = str(out)
    pn.serve(app_paths(), port=port, address=address, show=False, title="Workbench", start=True)


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
