"""Starts `moesaic up` with the demo model once for all tests and stops it afterwards."""
import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A running server: `http` (base URL), `grpc` (host:port) and the process."""

    def __init__(self, log_path: pathlib.Path):
        http, grpc = free_port(), free_port()
        self.http, self.grpc = f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        binary = os.environ.get("MOESAIC_BINARY", str(ROOT / "target/debug/moesaic"))
        binary = binary if os.path.isabs(binary) else str(ROOT / binary)
        self.log = open(log_path, "wb")
        self.process = subprocess.Popen(
            [binary, "up", "--model", str(ROOT / "deploy/models/demo-moe"), "--http", f"127.0.0.1:{http}", "--grpc", f"127.0.0.1:{grpc}"],
            stdout=self.log, stderr=subprocess.STDOUT, cwd=log_path.parent)
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(self.http + "/ready", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError("moesaic up did not become ready:\n" + log_path.read_text(errors="replace"))
            time.sleep(0.05)  # polls a condition, with the deadline above

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.log.close()
        return code


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    s = Server(tmp_path_factory.mktemp("moesaic") / "server.log")
    yield s
    assert s.stop() == 0, "SIGTERM drains and exits with status 0"
