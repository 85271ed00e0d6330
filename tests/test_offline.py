import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.notebook

# Loaded by every Python process of the run, kernels included: notes and refuses what leaves the machine.
GUARD = """
import os, socket
_connect, _resolve = socket.socket.connect, socket.getaddrinfo
_LOCAL = {"127.0.0.1", "::1", "localhost", "0.0.0.0", "", None}
def _refuse(what):
    with open(os.environ["GUARD_LOG"], "a") as log:
        log.write(f"{what}\\n")
    raise OSError(f"no network in this test: {what}")
def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in _LOCAL:
        _refuse(address)
    return _connect(self, address)
def resolve(host, *args, **kwargs):
    if host not in _LOCAL:
        _refuse(host)
    return _resolve(host, *args, **kwargs)
socket.socket.connect, socket.getaddrinfo = connect, resolve
"""


@pytest.mark.timeout(1500)
def test_the_main_job_runs_with_sockets_blocked_and_a_second_call_reuses_everything(tmp_path):
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD)
    log = tmp_path / "attempts"
    variables = {**os.environ, "PYTHONPATH": str(guard), "GUARD_LOG": str(log)}
    command = [
        sys.executable,
        "-m",
        "workbench",
        "reproduce",
        "--set",
        "tiny",
        "--out",
        str(tmp_path / "reports"),
    ]

    first = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=1000)
    assert first.returncode == 0, first.stderr[-2000:]
    assert not log.exists(), log.read_text()
    report = tmp_path / "reports" / "index.html"
    assert first.stdout.strip().splitlines()[-1] == f"report: {report}"
    assert report.is_file()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "reports" / "runs").rglob("*.parquet")}

    second = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=400)
    assert second.returncode == 0, second.stderr[-2000:]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "Executing" not in second.stderr


def test_the_guard_of_this_test_does_refuse(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(GUARD)
    variables = {**os.environ, "PYTHONPATH": str(tmp_path), "GUARD_LOG": str(tmp_path / "attempts")}
    asked = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    done = subprocess.run([sys.executable, "-c", asked], env=variables, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no network in this test" in done.stderr
    assert (tmp_path / "attempts").is_file()
