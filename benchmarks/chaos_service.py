"""A `coe serve` with fake experts for `chaos.py`, `overload.py` and `soak.py`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pandas as pd

from registry.spec import ExpertSpec, Kind
from registry.store import Registry
from routers import OutcomeTable, build, build_encoder, save

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from serve_process import GATEWAYS, HOSTS, ServeProcess, serving

EXPERTS: Final = {"loud": "fake://upper", "echo": "fake://echo"}
CONFIG: Final = """
engines:
  fake: {{token_delay_s: {token_s}, capacity: {capacity}}}
  remote: {{timeout_s: 5, retries: 0}}
host: {{budget: 1GiB}}
policies: {{default: {{router: router, fallback: loud}}{policies}}}
serve:
  http: {path}
  gateway: {{replicas: {replicas}}}
  pools: [{{replicas: {replicas}}}]
  host_silent_s: 3
  max_in_flight: {max_in_flight}
  log: {{folder: {log}}}
"""


async def all_up(service: ServeProcess, replicas: int, most_s: float = 120.0) -> None:
    """Wait until every gateway and host is there and responds. Raises TimeoutError."""
    async with asyncio.timeout(most_s):
        while not await asyncio.to_thread(_is_up, service, replicas):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def _is_up(service: ServeProcess, replicas: int) -> bool:
    with suppress(OSError, ValueError):
        hosts = [host.get("responds", True) for host in service.hosts()]
        running = [len(service.parts(part)) for part in (GATEWAYS, HOSTS)]
        return hosts == [True] * replicas and running == [replicas] * 2
    return False


def prepare(folder: Path, **more: str) -> None:
    """A registry with the experts, and a router that always chooses `loud`."""
    experts = EXPERTS | more
    (folder / "home").mkdir()
    with Registry(f"sqlite:///{folder / 'home'}/registry.db") as registry:
        for name, source in experts.items():
            kind = Kind.MODEL if source.startswith("fake:") else Kind.REMOTE
            registry.add(ExpertSpec(name=name, kind=kind, source=source))
    texts = [f"client {i} in turn {j}" for i in range(8) for j in range(8)]
    frame = pd.DataFrame({"query_id": range(len(texts)), "prompt": texts, "score::loud": 1.0, "score::echo": 0.0})
    table = OutcomeTable.from_frame(frame)
    encoder = build_encoder("hashing")
    save(build("knn", encoder, {"k": 3}).fit(table), folder / "router", table=table, encoder=encoder)


@contextmanager
def served(folder: Path, **settings: Any) -> Iterator[ServeProcess]:
    """A service that answers, from what `prepare` wrote; Ctrl-C ends it."""
    known = {"token_s": 0.01, "capacity": 64, "policies": "", "path": "proxy", "replicas": 2, "max_in_flight": 256}
    known["log"] = "home/logs/decisions"
    with serving(folder, CONFIG.format(**known | settings), "") as service:
        yield service
