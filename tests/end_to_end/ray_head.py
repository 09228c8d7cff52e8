"""A real Ray head with its dashboard on this machine, and a line to it that can be cut."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

HERE = "127.0.0.1"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HERE, 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def ray_head() -> Iterator[int]:
    """The port of a head's dashboard. The head knows nothing of this checkout but what is sent to it."""
    dashboard, client = free_ports(2)
    temporary = Path(tempfile.mkdtemp(prefix="head"))  # short: it holds sockets
    programs = Path(sys.executable).parent
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment |= {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        programs / "ray", "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address", HERE, "--port", "0", "--num-cpus", "2",
        "--include-dashboard", "true", "--dashboard-host", HERE,
        "--dashboard-port", str(dashboard), "--ray-client-server-port", str(client),
        "--dashboard-agent-listen-port", "0", "--dashboard-agent-grpc-port", "0",
        "--temp-dir", temporary,
    ]  # fmt: skip
    with (temporary / "output").open("w") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=temporary,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _await(f"http://{HERE}:{dashboard}/api/version", process, temporary / "output")
        yield dashboard
    finally:
        _end(process)
        shutil.rmtree(temporary, ignore_errors=True)


def _await(url: str, process: subprocess.Popen, output: Path) -> None:
    until = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=2).close()
            return
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < until, output.read_text()
        time.sleep(0.2)


def _end(process: subprocess.Popen) -> None:
    """The head, its process group and whatever they started, and nothing else."""
    family = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    psutil.wait_procs(family, timeout=5)
    for member in [*family, psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(10)


class Line:
    """A TCP relay in front of a port: `cut` ends what flows and refuses what is new."""

    def __init__(self, target: int) -> None:
        self.target, self.port = target, free_ports(1)[0]
        self._ends: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.mend()

    def mend(self) -> None:
        self._listener = socket.create_server((HERE, self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        listener, self._listener = self._listener, None
        for end in [listener, *self._ends]:
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
        self._ends = []

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection((HERE, self.target))
            except OSError:
                return
            self._ends += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
