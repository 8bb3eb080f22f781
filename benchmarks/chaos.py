"""Every part of a service fails under load, in turn: is every accepted request answered, and when is all well?

    python benchmarks/chaos.py [--clients 16] [--only NAME] [--json PATH]      # make chaos

Two gateways and two hosts of fake experts behind Ray Serve's proxy. Clients send without a pause and check every
answer; like OpenAI's, they send again what was answered with 429 or 5xx, or whose connection broke. Lost is what is
then not answered in 90 s, or answered wrongly. The exit status is 1 if anything is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from chaos_service import all_up, prepare, served
from checked_clients import Clients, loaded
from serve_process import CONTROLLER, GATEWAYS, HOSTS, PROXIES, ServeProcess

REPLICAS: Final = 2
PATIENCE_S: Final = 90.0
BEFORE_S: Final = 5.0
AFTER_S: Final = 5.0


@dataclass(frozen=True)
class Fault:
    """One failure. `inflict` returns what ends it, if it does not end by itself."""

    name: str
    inflict: Callable[[ServeProcess], Callable[[], None] | None]
    lasts_s: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--only", help="the fault whose name has these characters")
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    faults = [fault for fault in FAULTS if not given.only or given.only in fault.name]
    with tempfile.TemporaryDirectory(prefix="coe-chaos-") as made:
        rows = asyncio.run(run(Path(made), faults, given.clients))
    print(table(rows))
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(any(row["lost"] for row in rows))


async def run(folder: Path, faults: list[Fault], n_clients: int) -> list[dict[str, Any]]:
    """The faults in order, each under load, each after all is well again."""
    rows = []
    with small_disk(folder / "small") as small, hung_endpoint() as hung:
        prepare(folder, hung=hung)
        with served(folder, policies=", hung: {expert: hung, fallback: loud}", log=small) as service:
            for fault in faults:
                print(f"{fault.name} ...", file=sys.stderr, flush=True)
                rows.append(await under(service, fault, n_clients))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


async def under(service: ServeProcess, fault: Fault, n_clients: int) -> dict[str, Any]:
    """Inflict one fault under load, and wait until all is well."""
    await all_up(service, REPLICAS)
    async with loaded(service.url, n_clients) as clients:
        await asyncio.sleep(BEFORE_S)
        moment = time.monotonic()
        undo = await asyncio.to_thread(fault.inflict, service)
        await asyncio.sleep(fault.lasts_s)
        if undo is not None:
            await asyncio.to_thread(undo)
        healthy = True
        try:
            await all_up(service, REPLICAS, PATIENCE_S)
        except TimeoutError:
            healthy = False
        well = time.monotonic()
        await asyncio.sleep(AFTER_S)
    return judged(fault.name, clients, moment, well, healthy)


def judged(name: str, clients: Clients, moment: float, well: float, healthy: bool) -> dict[str, Any]:
    """What the clients saw, from the fault on. Seconds since the fault."""
    after = [each for each in clients.ended if each.ended > moment]
    right = sorted(each.ended for each in after if not each.wrong)
    silence_s = max((b - a for a, b in zip([moment, *right], right, strict=False)), default=float("inf"))
    hurt = [each.ended for each in after if each.retries or each.wrong]
    return {
        "fault": name,
        "requests": len(after),
        "lost": [each.wrong for each in after if each.wrong][:5],
        "sent_again": sum(each.retries > 0 for each in after),
        "slowest_s": round(max((each.ended - each.began for each in after), default=0.0), 1),
        "silence_s": round(silence_s, 1),
        "last_retry_s": round(max(hurt, default=moment) - moment, 1),
        "all_well_s": round(well - moment, 1) if healthy else None,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line a fault."""
    lines = [
        "| fault | requests since | lost | sent again | slowest, s | silence, s | all well after, s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        well = "never" if row["all_well_s"] is None else f"{row['all_well_s']:.1f}"
        seen = (row["requests"], len(row["lost"]), row["sent_again"], row["slowest_s"], row["silence_s"], well)
        lines.append(f"| {row['fault']} | " + " | ".join(map(str, seen)) + " |")
    return "\n".join(lines)


def kill(part: str) -> Callable[[ServeProcess], None]:
    """kill -9 of the oldest process of a kind."""

    def inflict(service: ServeProcess) -> None:
        os.kill(service.parts(part)[0], signal.SIGKILL)

    return inflict


def stop(part: str) -> Callable[[ServeProcess], Callable[[], None]]:
    """SIGSTOP of the oldest process of a kind; SIGCONT ends it."""

    def inflict(service: ServeProcess) -> Callable[[], None]:
        victim = service.parts(part)[0]
        os.kill(victim, signal.SIGSTOP)

        def undo() -> None:
            if victim in service.parts(part):  # else Ray Serve has replaced it
                os.kill(victim, signal.SIGCONT)

        return undo

    return inflict


def lose(name: str, instead: bytes | None = None) -> Callable[[ServeProcess], Callable[[], None]]:
    """Move a file or folder of the service away, or put `instead` in its place; undone by moving it back."""

    def inflict(service: ServeProcess) -> Callable[[], None]:
        path = service.folder / name
        kept = path.with_name(path.name + ".kept")
        path.rename(kept)
        if instead is not None:
            path.write_bytes(instead)

        def undo() -> None:
            path.unlink(missing_ok=True)
            kept.rename(path)

        return undo

    return inflict


def fill(service: ServeProcess) -> Callable[[], None]:
    """No byte is left for the decision log."""
    filler = service.folder / "small" / "filler"
    with suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    return filler.unlink


def ask_hung(service: ServeProcess) -> Callable[[], None]:
    """Sixteen requests to a remote expert that never responds; the policy's fallback must answer them."""
    answers: list[str] = []

    def one() -> None:
        body = {"model": "coe/hung", "messages": [{"role": "user", "content": "are you there"}]}
        command = ["curl", "-s", "-m", "60", "-H", "content-type: application/json", "-d", json.dumps(body)]
        done = subprocess.run([*command, f"{service.url}/v1/chat/completions"], capture_output=True, text=True)
        answers.append(done.stdout)

    threads = [threading.Thread(target=one) for _ in range(16)]
    for thread in threads:
        thread.start()

    def undo() -> None:
        for thread in threads:
            thread.join()
        wrong = [text for text in answers if "ARE YOU THERE" not in text]
        if wrong:
            raise RuntimeError(f"{len(wrong)} requests to a hung expert were not answered by the fallback: {wrong[0]}")

    return undo


@contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """A folder with 256 KiB of room where this may be mounted (root), else an ordinary one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        print("no small disk can be mounted: the fault `disk full` is left out", file=sys.stderr)
        FAULTS[:] = [fault for fault in FAULTS if fault.inflict is not fill]
    try:
        yield str(folder)
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def hung_endpoint() -> Iterator[str]:
    """The URL of an endpoint that accepts connections and sends nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"


FAULTS: Final = [
    Fault("controller, kill -9", kill(CONTROLLER)),
    Fault("host, kill -9", kill(HOSTS)),
    Fault("host, SIGSTOP for 10 s", stop(HOSTS), 10.0),
    Fault("gateway, kill -9", kill(GATEWAYS)),
    Fault("gateway, SIGSTOP for 10 s", stop(GATEWAYS), 10.0),
    Fault("proxy, kill -9", kill(PROXIES["proxy"])),
    Fault("proxy, SIGSTOP for 10 s", stop(PROXIES["proxy"]), 10.0),
    Fault("disk of the decision log full for 10 s", fill, 10.0),
    Fault("registry gone for 10 s", lose("home/registry.db"), 10.0),
    Fault("registry replaced by garbage for 10 s", lose("home/registry.db", b"garbage" * 1000), 10.0),
    Fault("router's folder gone for 10 s", lose("router"), 10.0),
    Fault("remote expert hung", ask_hung),
]

if __name__ == "__main__":
    main()
