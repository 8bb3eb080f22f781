"""A service and a batch on a Ray cluster of three nodes, all on this machine: one node dies under load, experts change.

The registry is on Postgres where it can be started, the batch's files are fsspec URLs. `pytest -m slow` runs it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import servers
from checked_clients import loaded
from serve_process import ServeProcess, starting, until

from coe.serve.cluster.server import ENVIRONMENT
from registry.spec import ExpertSpec, Kind
from registry.store import Registry

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
NODES = 3
SERVICE = """
registry: "{registry}"
engines: {{fake: {{token_delay_s: 0.01, capacity: 64}}}}
host: {{budget: 1GiB}}
policies: {{default: {{expert: loud}}}}
serve:
  ray: "{address}"
  http: proxy
  gateway: {{replicas: {nodes}, num_cpus: 0.5}}
  pools: [{{replicas: {nodes}, num_cpus: 1}}]
  host_silent_s: 3
  log: {{folder: null}}
"""


class Nodes:
    """Ray's nodes: processes of this machine, each with its own raylet and workers."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        options: dict[str, Any] = {"num_cpus": 12, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=options)
        del options["include_dashboard"]
        self.others = [self.cluster.add_node(**options) for _ in range(NODES - 1)]
        self.cluster.wait_for_nodes()

    def of(self, title: str) -> dict[int, int]:
        """The processes whose title begins so: pid -> pid of the raylet of its node."""
        raylets = [process.pid for process in psutil.Process().children(recursive=True) if process.name() == "raylet"]
        return {
            child.pid: raylet
            for raylet in raylets
            for child in psutil.Process(raylet).children()
            if " ".join(child.cmdline()).startswith(title)
        }

    def kill(self, node: Any) -> None:
        """kill -9 of a node."""
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        made = Nodes()
        yield made
        made.cluster.shutdown()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ExitStack() as stack:
        yield stack.enter_context(servers.postgres())


@pytest.fixture(scope="module")
def service(nodes: Nodes, url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    with Registry(url) as registry:
        registry.add(ExpertSpec(name="loud", kind=Kind.MODEL, source="fake://upper"))
    config = SERVICE.format(registry=url, address=nodes.cluster.address, nodes=NODES)
    with starting(tmp_path_factory.mktemp("service"), config) as running:
        running.wait_for("Ctrl-C  stops")
        yield running
        running.ctrl_c()
        assert running.process.wait(60) == 0


def models(service: ServeProcess) -> list[str]:
    with urllib.request.urlopen(f"{service.url}/v1/models", timeout=10) as answer:
        return [model["id"] for model in json.load(answer)["data"]]


HOSTS, GATEWAYS = "ray::ServeReplica:coe:hosts", "ray::ServeReplica:coe:gateway"


def test_gateways_and_hosts_are_on_all_nodes(service: ServeProcess, nodes: Nodes) -> None:
    for part in (HOSTS, GATEWAYS):
        assert len(set(nodes.of(part).values())) == NODES, part
    assert [host.get("responds", True) for host in service.hosts()] == [True] * NODES


async def test_experts_change_under_load_on_every_node(service: ServeProcess, url: str) -> None:
    async with loaded(service.url, 8) as clients:
        await asyncio.sleep(3)
        with Registry(url) as registry:
            registry.add(ExpertSpec(name="loud", kind=Kind.MODEL, source="fake://upper", description="newer"))
            registry.add(ExpertSpec(name="quiet", kind=Kind.MODEL, source="fake://echo"))
        await asyncio.to_thread(until, lambda: "quiet" in models(service), 60)
        await asyncio.sleep(3)
    assert len(clients.ended) > 16 and not [each for each in clients.ended if each.wrong or each.retries]


async def test_a_node_dies_under_load_and_no_accepted_request_is_lost(service: ServeProcess, nodes: Nodes) -> None:
    """Its requests are sent again by their clients; its hosts and gateways start on the nodes that are left."""
    async with loaded(service.url, 8) as clients:
        await asyncio.sleep(3)
        began = time.monotonic()
        await asyncio.to_thread(nodes.kill, nodes.others.pop())
        await asyncio.to_thread(until, lambda: len(nodes.of(HOSTS)) == NODES, 120, lambda: service.screen)
        await asyncio.to_thread(until, lambda: len(service.hosts()) == NODES, 60)
        await asyncio.sleep(3)
    after = [each for each in clients.ended if each.ended > began]
    assert len(after) > 16 and not [each.wrong for each in clients.ended if each.wrong]
    assert len(set(nodes.of(HOSTS).values())) == NODES - 1


def test_a_node_dies_under_a_batch_and_every_row_is_answered_once(nodes: Nodes, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    n_rows = 400
    rows = [{"id": f"row {i}", "prompt": f"say {i} more words for this row"} for i in range(n_rows)]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "experts.yaml").write_text(
        "experts:\n" + "".join(f"  - {{name: e{i}, kind: model, source: 'fake://upper'}}\n" for i in range(3))
    )
    (tmp_path / "batch.yaml").write_text(
        "experts: [experts.yaml]\nhost: {budget: 1GiB}\nengines: {fake: {token_delay_s: 0.05, capacity: 4}}\n"
        "policies: {default: {expert: e0}}\nbatch: {hosts: {replicas: 2}, part_rows: 100}\n"
    )
    command = [sys.executable, "-m", "coe.cli.entry", "batch", "--input", f"file://{tmp_path}/in.jsonl"]
    command += ["--out", f"file://{tmp_path}/run", "--config", str(tmp_path / "batch.yaml")]
    running = subprocess.Popen([*command, "--ray", nodes.cluster.address], stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: any(tmp_path.glob("run/**/answers*")) or running.poll() is not None, 120)
        nodes.kill(nodes.others.pop())
        _, said = running.communicate(timeout=300)
    finally:
        running.kill()
    assert running.returncode == 0, said
    table = pq.read_table(tmp_path / "run" / "results.parquet").to_pylist()
    assert sorted(row["id"] for row in table) == sorted(row["id"] for row in rows)
    assert all(row["answer"] == next(r["prompt"] for r in rows if r["id"] == row["id"]).upper() for row in table)
