"""`coe serve` as a user starts it: a separate process that tests inspect, disturb and stop without leftovers.

with serving(folder, CONFIG, EXPERTS) as service:
    client = openai.OpenAI(base_url=service.base_url, api_key="none")
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil  # type: ignore[import-untyped]

GATEWAYS: Final = "ray::ServeReplica:coe:gateway"
HOSTS: Final = "ray::ServeReplica:coe:hosts"
PROXIES: Final = {"proxy": "ray::ProxyActor", "haproxy": "ray::HAProxyManager"}
"""The process of Ray Serve's proxy, by the setting `serve.http`."""
HAPROXY: Final = "/haproxy -db"
CONTROLLER: Final = "ray::ServeController"
READY_S: Final = 150.0
STOP_S: Final = 10.0
"""Seconds that a Ctrl-C may take."""


@dataclass(frozen=True)
class ServeProcess:
    """A running `coe serve`. Every process that it starts is in its session, whose id is its pid."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        """For OpenAI's client."""
        return f"{self.url}/v1"

    @property
    def screen(self) -> str:
        """Everything printed so far."""
        return (self.folder / "screen.txt").read_text()

    @property
    def logs(self) -> Path:
        """The folder of its decision log."""
        return self.folder / "home" / "logs" / "decisions"

    def parts(self, words: str) -> list[int]:
        """Pids of its processes whose title has these words, the oldest first."""
        return [process.pid for process in self.everything() if words in title(process)]

    def everything(self) -> list[psutil.Process]:
        """All its processes that live, the oldest first."""
        return sorted(_session(self.process.pid), key=lambda process: process.pid)

    def listening(self) -> set[tuple[str, int]]:
        """Addresses and ports on which its processes accept TCP connections."""
        return {
            (connection.laddr.ip, connection.laddr.port)
            for process in self.everything()
            for connection in _connections(process)
            if connection.status == psutil.CONN_LISTEN
        }

    def links(self) -> dict[str, int]:
        """Connections of gateways to each host, by the path of its socket."""
        paths = [
            connection.laddr
            for pid in self.parts(HOSTS)
            for connection in psutil.Process(pid).net_connections("unix")
            if str(connection.laddr).endswith(".sock") and "/coe/" in connection.laddr
        ]
        return {path: paths.count(path) - 1 for path in paths}  # the host itself listens there

    def health(self) -> dict[str, Any]:
        """The body of `/health`."""
        with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
            about: dict[str, Any] = json.load(answer)
        return about

    def hosts(self) -> list[dict[str, Any]]:
        """The status of every expert host."""
        hosts: list[dict[str, Any]] = self.health()["hosts"]
        return hosts

    def wait_for(self, words: str, times: int = 1, timeout_s: float = READY_S) -> None:
        """Wait until the screen has these words so many times. Fails if the command ends before that."""
        until(lambda: self.screen.count(words) >= times or self.process.poll() is not None, timeout_s, self._shown)
        assert self.screen.count(words) >= times, f"`coe serve` ended with {self.process.returncode}:\n{self.screen}"

    def ctrl_c(self) -> None:
        """As a terminal sends it: to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def ended(self, timeout_s: float = STOP_S) -> int:
        """The exit status, when it has ended in time and left no process."""
        status = self.process.wait(timeout_s)
        until(lambda: not self.everything(), 2, lambda: f"left behind: {[title(p) for p in self.everything()]}")
        return status

    def _shown(self) -> str:
        return f"the screen says:\n{self.screen}"


@contextmanager
def starting(folder: Path, config: str, experts: str = "", **environment: str) -> Iterator[ServeProcess]:
    """Start the command on these files, without waiting; remaining processes are killed at the end."""
    (folder / "experts.yaml").write_text(experts)
    (folder / "service.yaml").write_text(config)
    port = free_port()
    coe = [sys.executable, "-c", "from coe.cli.entry import main; main()"]
    with (folder / "screen.txt").open("wb") as screen:
        process = subprocess.Popen(
            [*coe, "serve", "--config", str(folder / "service.yaml"), "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=screen,
            stderr=subprocess.STDOUT,
            env={**os.environ, "COE_HOME": str(folder / "home"), **environment},
            start_new_session=True,
            preexec_fn=_hear_ctrl_c,
        )
    service = ServeProcess(process, port, folder)
    try:
        yield service
    finally:
        for left in service.everything():
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()


@contextmanager
def serving(folder: Path, config: str, experts: str) -> Iterator[ServeProcess]:
    """A service that answers; Ctrl-C at the end must stop it and leave no process."""
    with starting(folder, config, experts) as service:
        service.wait_for("Ctrl-C  stops")
        yield service
        service.ctrl_c()
        assert service.ended(3 * STOP_S) == 0  # only tests that start nothing else check the time
        assert service.screen.rstrip().endswith("stopped") and "Traceback" not in service.screen


def until(true: Callable[[], object], timeout_s: float, otherwise: Callable[[], str] = str) -> float:
    """Wait until it is true; the seconds that took. Fails with the message of `otherwise`."""
    started = time.perf_counter()
    while not true():
        assert time.perf_counter() - started < timeout_s, f"not within {timeout_s:g} s; {otherwise()}"
        time.sleep(0.1)
    return time.perf_counter() - started


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _session(leader: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _connections(process: psutil.Process) -> list[Any]:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return list(process.net_connections("tcp"))
    return []


def title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def _hear_ctrl_c() -> None:
    """Background jobs of a shell ignore it, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
