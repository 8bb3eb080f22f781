"""Servers of others that tests start where they are installed: Postgres and Redis. Else the tests are skipped."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

START_S = 60.0


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database."""
    pytest.importorskip("psycopg", reason="the driver of Postgres is not installed")
    programs = _folder_of("initdb")
    user = _unprivileged() if os.getuid() == 0 else None  # the server refuses to run as root
    with tempfile.TemporaryDirectory(prefix="coe-pg-", ignore_cleanup_errors=True) as made:
        folder, port = Path(made), _free_port()
        if user is not None:
            os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        data, said = folder / "data", {"cwd": folder, "user": user, "stdout": subprocess.DEVNULL}
        initdb = [programs / "initdb", "-D", data, "-A", "trust", "-U", "coe", "--no-sync", "--no-instructions"]
        subprocess.run(initdb, check=True, **said)  # type: ignore[call-overload]
        options = ("-c", f"unix_socket_directories={folder}", "-c", "fsync=off")
        server = [programs / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", *options]
        with _running(server, port, stderr=subprocess.DEVNULL, **said):
            yield f"postgresql+psycopg://coe@127.0.0.1:{port}/postgres"


@contextmanager
def redis() -> Iterator[str]:
    """The URL of an empty Redis server."""
    pytest.importorskip("redis", reason="the client of Redis is not installed")
    program, port = _folder_of("redis-server") / "redis-server", _free_port()
    server = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with tempfile.TemporaryDirectory() as folder, _running(server, port, cwd=folder, stdout=subprocess.DEVNULL):
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def _running(command: list[object], port: int, **options: object) -> Iterator[None]:
    process = subprocess.Popen([str(each) for each in command], **options)  # type: ignore[call-overload]
    try:
        ends = time.monotonic() + START_S
        while not _accepts(port):
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"{command[0]} did not start: {process.poll()}")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(START_S)


def _folder_of(program: str) -> Path:
    """Where a program is; Debian keeps those of Postgres out of PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]))
    if found is None:
        pytest.skip(f"{program} is not installed")
    return Path(found).parent


def _unprivileged() -> str:
    names = {each.pw_name for each in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), "nobody")


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port: int = taken.getsockname()[1]
        return port


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1):
            return True
    except OSError:
        return False
