"""The work of a run on Ray: rows are routed and stepped on Ray Data, and answered by the run's own actors (`hosts`).

Only numbers of bundles and parts enter Ray Data, and only reports leave it. Rows and answers go through the part
files, so nothing has to fit in the object store, and a worker that dies loses only what it had not written.

Ray Data's own checkpoints (`DataContext.checkpoint_config`, Ray 2.60) were tried first: read_parquet -> map_batches
(two actors) -> write_parquet, 20,000 rows in 67 s, killed with -9 at 24 random moments. No row was lost or doubled, but
none was kept either: nothing was written before all actors were done. They also require one output row for each input
row, and give every filter all ids at once. Part files are kept from the first one on.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.exceptions import RayError

from coe.batch.answering import WorkReport
from coe.batch.errors import BatchError
from coe.batch.hosts import HostPool
from coe.batch.parts import PLANNED_PART, Job, PartRouter, PlannedPart, open_router, step_part
from coe.batch.source import Split
from coe.batch.stages import WorkItem
from coe.config import BatchConfig
from coe.errors import CoeError
from coe.hosting import engine_kinds, gpu_share, uses_gpu
from coe.own_ray import start_ray
from registry.errors import RegistryError
from routers.errors import RouterError

_OBJECT_STORE_BYTES = 256 * 2**20
"""Little data flows through Ray; the memory of its default, a third of the machine's, is left to the experts."""
_ITEMS_PER_WORKER = 8
_DEATHS = 10
"""Hosts that die at work in a stage, beyond which the run ends; and those that die in a row while they open."""
_Batch = dict[str, Any]


class RayExecutor:
    """The executor (`run.Executor`) on the Ray cluster that this process is connected to."""

    def __init__(self, config: BatchConfig) -> None:
        self._config = config
        self.hosts = config.hosts.replicas.max
        self._pool: HostPool | None = None

    def close(self) -> None:
        """End the hosts."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def route(self, job: Job, bundles: Sequence[tuple[Split, ...]]) -> Iterator[PlannedPart]:
        """One actor at first, more while bundles wait; each holds the routers and their encoder."""
        pool = ActorPoolStrategy(min_size=1, max_size=self._side_by_side(len(bundles)))
        reports = _map(len(bundles), _Router, pool, fn_constructor_args=(job, bundles), num_cpus=1)
        return map(PLANNED_PART.validate_python, reports)

    def step(self, job: Job, stage: int, parts: Sequence[int]) -> Iterator[PlannedPart]:
        """Plain tasks: planning needs no state."""
        pool = TaskPoolStrategy(size=self._side_by_side(len(parts)))
        reports = _map(len(parts), _step, pool, fn_args=(job, stage, parts), num_cpus=1)
        return map(PLANNED_PART.validate_python, reports)

    def answer(self, job: Job, stage: int, items: Sequence[WorkItem]) -> Iterator[WorkReport]:
        """Actors with one host each. They stay for later stages, where the cluster has a CPU for other work."""
        if self._pool is None:
            given = self._config.hosts
            options: dict[str, Any] = {"num_cpus": given.num_cpus, "num_gpus": self._gpus(job)}
            if given.threads > 1:  # without it, Ray takes workers that run already; they have one thread
                options["runtime_env"] = {"env_vars": given.environment}
            self._pool = HostPool(job, options, self.hosts, _DEATHS)
        try:
            yield from self._pool.answer(stage, items)
        except Exception as error:
            if (cause := _cause(error)) is error:
                raise
            raise cause from error
        if self._cpus() < _reserved_cpus(self._config):
            self.close()

    def _cpus(self) -> int:
        return int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]

    def _gpus(self, job: Job) -> float:
        """GPUs of each host: the stated ones, else what their engines use.

        Raises:
            BatchError: the cluster that this run started has too few; Ray would wait without end.
        """
        given, available = self._config.hosts, float(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
        if given.num_gpus is None:
            used = uses_gpu(job.config, engine_kinds(job.config, job.snapshot))
            return gpu_share(given.replicas.max, available) if used else 0.0
        if self._config.ray is None and given.num_gpus > available:
            raise BatchError(
                f"a host of the batch asks for {given.num_gpus:g} GPUs (`batch.hosts.num_gpus`), and Ray has "
                f"{available:g}: lower it, or join a cluster that has them (--ray)"
            )
        return given.num_gpus

    def _side_by_side(self, items: int) -> int:
        """How many workers pay: a start costs seconds, a few items do not; the CPUs of the hosts are not available."""
        return max(1, min(items // _ITEMS_PER_WORKER, self._cpus() - _reserved_cpus(self._config)))


@contextmanager
def ray_executor(config: BatchConfig) -> Iterator[RayExecutor]:
    """Connect to the configured Ray cluster, or start one on this machine for the duration of the block.

    An existing connection of this process is used and kept.

    Raises:
        BatchError: there is no Ray cluster at the address.
    """
    ours = not ray.is_initialized()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's core prints a warning for each actor pool that Ray Data starts; errors are raised as exceptions.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for logger in ("ray", "ray.data"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        if ours:
            with _quiet_stderr(), _own_sigterm():
                _connect(config)
        executor = RayExecutor(config)
        try:
            yield executor
        finally:
            executor.close()
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discard what Ray's core writes to stderr while it starts; errors are raised as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM: Ray's core replaces it by one that ends the process on the spot."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _connect(config: BatchConfig) -> None:
    if config.ray is not None:
        try:
            ray.init(address=config.ray, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RayError, ValueError, RuntimeError) as error:
            raise BatchError(f"no Ray cluster at {config.ray!r}: {error}; check `batch.ray` or --ray") from error
        return
    start_ray(
        # More than the machine has: hosts must find their CPUs beside the tasks that read and plan.
        num_cpus=(os.cpu_count() or 1) + _reserved_cpus(config),
        object_store_memory=_OBJECT_STORE_BYTES,
    )


def _reserved_cpus(config: BatchConfig) -> int:
    """Logical CPUs for the hosts, and one more."""
    return math.ceil(config.hosts.replicas.max * config.hosts.num_cpus) + 1


def _map(
    count: int, work: Callable[..., Any], pool: ActorPoolStrategy | TaskPoolStrategy, **options: Any
) -> Iterator[dict[str, Any]]:
    """Call `work` with the numbers 0 to count - 1, in order, one at a time; yield its reports as they arrive."""
    if not count:
        return
    numbers = ray.data.from_items([{"number": i} for i in range(count)], override_num_blocks=count)
    context = numbers.context
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # a report leaves its task at once, not when a block is full
    reports = numbers.map_batches(work, batch_size=1, compute=pool, **options)
    try:
        for row in reports.iter_rows():
            yield json.loads(row["report"])
    except Exception as error:
        raise _cause(error) from error


def _cause(error: BaseException) -> Exception:
    """The error that the work raised, which Ray wraps in its own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, CoeError | RegistryError | RouterError) and not isinstance(seen, RayError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return BatchError(f"the batch stopped: {error}")


class _Router:
    """The actor that routes bundles of splits."""

    def __init__(self, job: Job, bundles: Sequence[tuple[Split, ...]]) -> None:
        self._router = PartRouter(job, open_router(job.config, job.snapshot))
        self._bundles = bundles

    def __call__(self, batch: _Batch) -> Iterator[_Batch]:
        for number in batch["number"]:
            for stepped in self._router.route(self._bundles[number]):
                yield _report(PLANNED_PART.dump_python(stepped, mode="json"))


def _step(batch: _Batch, job: Job, stage: int, parts: Sequence[int]) -> Iterator[_Batch]:
    for number in batch["number"]:
        yield _report(PLANNED_PART.dump_python(step_part(job, parts[number], stage), mode="json"))


def _report(value: dict[str, Any]) -> _Batch:
    return {"report": np.array([json.dumps(value)], dtype=object)}
