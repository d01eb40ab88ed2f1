"""Servers that are started for a run, as processes: they come up or say why not, and nothing of them stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from redraft.adaptation.server_bench import launched
from redraft.errors import UserError

httpx = pytest.importorskip("httpx")

SERVE = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        data = json.dumps({"data": [{"id": str(os.getpid())}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
print("starting", flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def served_pid(url: str) -> int:
    return int(httpx.get(f"{url}/v1/models").json()["data"][0]["id"])


def test_a_launched_server_is_gone_afterwards(tmp_path: Path) -> None:
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    command = f"sh -c '{sys.executable} {script} {{port}}; exit 0'"  # a child of a child, as engines have them
    with pytest.raises(ZeroDivisionError), launched(command, tmp_path / "log") as url:
        pid = served_pid(url)
        assert alive(pid)
        raise ZeroDivisionError
    assert not alive(pid) and "starting" in (tmp_path / "log").read_text()


def test_a_server_that_does_not_come_up(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(UserError, match="cannot be run: No such file"), launched("/no/such/server {port}", log):
        pass
    command = f"{sys.executable} -c \"import sys; print('no memory'); sys.exit(3)\" {{port}}"
    with pytest.raises(UserError, match="ended with exit code 3; the end of .*no memory"), launched(command, log):
        pass
    sleeper = f'{sys.executable} -c "import time; time.sleep(600)" {{port}}'
    with pytest.raises(UserError, match="did not answer within 0.3 s"), launched(sleeper, log, start_seconds=0.3):
        pass


def test_a_signal_stops_the_launched_server_too(tmp_path: Path) -> None:
    script, marker = tmp_path / "serve.py", tmp_path / "url"
    script.write_text(SERVE)
    program = (
        "import pathlib, time\n"
        "from redraft.adaptation.server_bench import launched\n"
        f"with launched({f'{sys.executable} {script} {{port}}'!r}, pathlib.Path({str(tmp_path / 'log')!r})) as url:\n"
        f"    pathlib.Path({str(marker)!r} + '.new').write_text(url)\n"
        f"    pathlib.Path({str(marker)!r} + '.new').rename({str(marker)!r})\n"
        "    time.sleep(600)\n"
    )
    runner = subprocess.Popen([sys.executable, "-c", program])
    try:
        while not marker.exists():
            assert runner.poll() is None
            time.sleep(0.05)
        pid = served_pid(marker.read_text())
        runner.send_signal(signal.SIGTERM)
        assert runner.wait() == 128 + signal.SIGTERM
    finally:
        runner.kill()
    assert not alive(pid)
