"""Checks of what a service needs: its port, its experts and their files, its configuration, and Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from coe.cli.doctor.finding import Finding, Level
from registry.errors import RegistryError
from registry.spec import ExpertSpec, Kind
from registry.storage import coe_home
from registry.store import Snapshot

HEALTH_S = 3.0
"""Seconds that whatever listens on the port may take for its whole answer."""
MOST_HEALTH_BYTES = 2**20
"""Bytes of its answer that are read."""
_MOST_SHOWN = 100
"""Warnings and hosts of a service that are shown."""
_MOST_CHARACTERS = 500
"""Characters of each."""
_RAY_PROCESSES = ("gcs_server", "raylet")


def port(host: str, number: int) -> Iterator[Finding]:
    """Whether `coe serve` could listen there."""
    from coe.errors import ConfigError
    from coe.serve.cluster.ingress import check_port

    place = f"{host}:{number}"
    try:
        check_port(host, number)
    except ConfigError as error:
        health = _health(host, number)
        if health is not None:
            yield Finding("port", Level.OK, f"a service answers at http://{place}/v1")
            yield from _warnings(health)
        else:
            fix = (
                f"stop what listens there, or choose another: coe serve --port {number + 1 if number < 65535 else 8000}"
            )
            yield Finding("port", Level.BROKEN, f"{place} cannot be listened on: {error.__cause__}", fix)
    else:
        yield Finding("port", Level.OK, f"{place} is free")


def registry(url: str | None) -> Iterator[Finding]:
    """The registry, and the entries whose files are gone."""
    from registry.store import Registry

    if url is None and not (coe_home() / "registry.db").exists():
        text = "there is no registry yet"
        yield Finding(
            "registry", Level.OK, f"{text}; `coe registry apply FILE` makes one, a configuration may do without"
        )
        return
    try:
        with Registry(url) as store:
            shown, specs = store.url, store.list()
    except RegistryError as error:
        yield Finding("registry", Level.BROKEN, str(error), "check --registry, or COE_REGISTRY")
        return
    from registry.sources import SourceKind, is_here, source_kind

    absent = [spec for spec in specs if not is_here(spec)]
    for spec in absent:
        if source_kind(spec.source) is SourceKind.HUB:
            yield Finding("registry", Level.OK, f"{spec.name}: {spec.source} is downloaded when it is first used")
        else:
            fix = f"restore it, register it again, or: coe registry remove {spec.name}"
            yield Finding("registry", Level.BROKEN, f"{spec.name}: {spec.source} is gone", fix)
    yield Finding("registry", Level.OK, f"{shown}: {len(specs)} experts")


def configuration(path: Path) -> Iterator[Finding]:
    """All that `coe config check` finds."""
    from coe.cli.config.check import check_config

    found = check_config(path)
    for problem in found.problems:
        yield Finding("config", Level.BROKEN, str(problem), f"correct {problem.file}")
    for note in found.notes:
        yield Finding("config", Level.WARNING, str(note))
    if not found.problems:
        yield Finding("config", Level.OK, f"{path}: {len(found.experts)} experts, {len(found.policies)} policies")


def budget(path: Path) -> Iterator[Finding]:
    """Whether each model fits the memory that the configuration gives, and that the machine has."""
    from coe.config import load_config
    from coe.errors import CoeError
    from coe.experts import open_snapshot

    try:
        config = load_config(path)
        snapshot = open_snapshot(config)
    except (CoeError, RegistryError):
        return  # `configuration` reports it
    total = psutil.virtual_memory().total
    limit = config.host.budget or int(0.8 * psutil.virtual_memory().available)
    if config.host.budget is not None and config.host.budget > total and config.engines.hf.device in ("auto", "cpu"):
        text = f"`host.budget` is {config.host.budget / 2**30:.1f} GiB, the machine has {total / 2**30:.1f} GiB"
        yield Finding("budget", Level.WARNING, text, "lower it, unless experts are loaded to a GPU")
    for spec in snapshot.experts.values():
        size_bytes = _in_memory_bytes(spec, snapshot)
        if size_bytes is not None and size_bytes > limit:
            text = f"{spec.name} takes {size_bytes / 2**30:.1f} GiB, the budget is {limit / 2**30:.1f} GiB"
            yield Finding("budget", Level.BROKEN, text, "raise `host.budget`, or choose a smaller expert")


def _in_memory_bytes(spec: ExpertSpec, snapshot: Snapshot) -> int | None:
    """Bytes of the weights that are in memory together; of a composed expert, without peers that are called before."""
    if spec.kind is not Kind.COMPOSED:
        return spec.size_bytes
    sizes = [snapshot.experts[name].size_bytes for name in spec.residency_keys(snapshot.experts)]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def ray() -> Iterator[Finding]:
    """Processes of Ray that run, and the space that its sessions take."""
    running = [one for one in psutil.process_iter(["name", "pid", "ppid"]) if one.info["name"] in _RAY_PROCESSES]
    orphans = [one for one in running if one.info["ppid"] == 1]
    if orphans:
        pids = " ".join(str(one.info["pid"]) for one in orphans)
        text = f"{len(orphans)} processes of Ray have lost the command that started them (pid {pids})"
        yield Finding("ray", Level.WARNING, text, f"unless a cluster is meant to run here: kill {pids}")
    elif running:
        yield Finding("ray", Level.OK, "a Ray runs, of a service or a batch")
    else:
        yield Finding("ray", Level.OK, "no Ray runs")
    shm = Path("/dev/shm")
    if shm.is_dir():
        left = psutil.disk_usage(str(shm)).free
        if left < 300 * 2**20:
            text = f"/dev/shm has {left / 2**20:.0f} MiB free; Ray keeps its objects there"
            yield Finding("ray", Level.WARNING, text, "give the container more shared memory: docker run --shm-size=1g")


def _warnings(health: Mapping[str, Any]) -> Iterator[Finding]:
    """What a running service reports about itself in `/health`; each text on one line, since anything may answer."""
    if problem := health.get("problem"):
        yield Finding("service", Level.BROKEN, _shown(problem), "see the output of `coe serve` and its log files")
    for warning in _listed(health.get("warnings")):
        yield Finding("service", Level.WARNING, _shown(warning), "see the output of `coe serve`")
    for state in _listed(health.get("hosts")):
        if isinstance(state, dict) and not state.get("responds", True):
            text = f"host {_shown(state.get('id'))} of pool {_shown(state.get('pool'))} does not respond"
            yield Finding("service", Level.WARNING, text, "other hosts take its requests; see its process")
        yield from _unhealthy(state)


def _unhealthy(state: Any) -> Iterator[Finding]:
    """The experts of a host that do not answer now."""
    experts = state.get("unhealthy") if isinstance(state, dict) else None
    for name, reason in islice(experts.items() if isinstance(experts, dict) else (), _MOST_SHOWN):
        text = f"expert {_shown(name)} of pool {_shown(state.get('pool'))} does not answer: {_shown(reason)}"
        yield Finding("service", Level.WARNING, text, "see the log of its host")


def _listed(value: Any) -> Sequence[Any]:
    return value[:_MOST_SHOWN] if isinstance(value, list) else ()


def _shown(value: Any) -> str:
    from coe.seam import one_line

    return one_line(str(value), _MOST_CHARACTERS)


def _health(host: str, number: int) -> dict[str, Any] | None:
    """The `/health` of a service of ours that answers at the port; None if none does.

    Whatever listens there may send anything: time and size are bounded, redirects are not followed.
    """
    from coe.engines.remote.client import fetch
    from coe.engines.remote.events import MalformedStream

    place = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    place = f"[{place}]" if ":" in place else place
    try:
        asked = fetch(f"http://{place}:{number}/health", timeout_s=HEALTH_S, most_bytes=MOST_HEALTH_BYTES)
        status, body = asyncio.run(asked)
    except (OSError, MalformedStream, ValueError):
        return None
    found = _object(body)
    return (found or {}) if status == 503 else found if status == 200 else None


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
