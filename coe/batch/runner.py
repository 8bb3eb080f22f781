"""The work of a run on Ray Data: the only place that touches it.

What flows through Ray Data is small: numbers of bundles and items in, reports out. Rows and answers go through the
part files, so nothing has to fit in the object store, and a worker that dies costs what it had not written.

Ray Data's own checkpoints (`DataContext.checkpoint_config`, Ray 2.60) were tried first: read_parquet -> map_batches
(two actors) -> write_parquet, 20,000 rows in 67 s, killed with -9 at 24 random moments. No row was lost or doubled, but
none was kept either: nothing was written before all actors were done. They also want one row out for each row in, and
give every filter all the ids at once. Part files are kept from the first one on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import queue
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.exceptions import RayError

from coe.batch.answering import Answerer, LoadCounter, WorkReport
from coe.batch.claims import Claims
from coe.batch.errors import BatchError
from coe.batch.parts import PARTS, Job, PartRouter, PlannedPart, open_router, step_part
from coe.batch.records import plain
from coe.batch.source import Split
from coe.batch.stages import WorkItem
from coe.config import BatchConfig
from coe.errors import CoeError
from coe.host import open_host
from registry.errors import RegistryError
from routers.errors import RouterError

_OBJECT_STORE_BYTES = 256 * 2**20
"""What flows through Ray is small; a third of the memory, its default, is better left to the experts."""
_ITEMS_PER_WORKER = 8
_DEATHS = 10
"""Of actors that answer, within a stage. Ray replaces them without end, and what crashes one may crash them all."""
_Batch = dict[str, Any]


class RayExecutor:
    """Does the work of a run on the Ray that this process is connected to; see `run.Executor`."""

    def __init__(self, config: BatchConfig) -> None:
        self._config = config
        self.hosts = config.hosts.replicas.max

    def route(self, job: Job, bundles: Sequence[tuple[Split, ...]]) -> Iterator[PlannedPart]:
        """One actor at first, more while bundles wait: each holds the routers, and their encoder."""
        pool = ActorPoolStrategy(min_size=1, max_size=self._side_by_side(len(bundles)))
        told = _map(len(bundles), _Router, pool, fn_constructor_args=(job, bundles), num_cpus=1)
        return map(PlannedPart.of, told)

    def step(self, job: Job, stage: int, parts: Sequence[int]) -> Iterator[PlannedPart]:
        """Plain tasks: planning needs no state."""
        pool = TaskPoolStrategy(size=self._side_by_side(len(parts)))
        told = _map(len(parts), _step, pool, fn_args=(job, stage, parts), num_cpus=1)
        return map(PlannedPart.of, told)

    def answer(self, job: Job, stage: int, items: Sequence[WorkItem]) -> Iterator[WorkReport]:
        """Actors that hold a host each."""
        given = self._config.hosts
        pool = ActorPoolStrategy(
            min_size=min(given.replicas.min, len(items)),
            max_size=min(given.replicas.max, len(items)),
            max_tasks_in_flight_per_actor=1,  # a turn is long: who is free first takes the next one
        )
        options: dict[str, Any] = {"num_cpus": given.num_cpus, "num_gpus": given.num_gpus}
        if given.threads > 1:  # Ray's workers have one thread anyway, and those that run already are taken
            options["runtime_env"] = {"env_vars": given.environment}
        claims = ray.remote(num_cpus=0)(Claims).remote(len(items), pool.max_size)
        told = _map(len(items), _HostActor, pool, fn_constructor_args=(job, stage, items, claims, _DEATHS), **options)
        return map(WorkReport.of, told)

    def _side_by_side(self, items: int) -> int:
        """Workers worth starting: a start costs seconds, some items do not; and what the hosts need is not there."""
        cpus = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
        return max(1, min(items // _ITEMS_PER_WORKER, cpus - _reserved_cpus(self._config)))


@contextmanager
def ray_executor(config: BatchConfig) -> Iterator[RayExecutor]:
    """Connect to the Ray of the configuration, or start one on this machine that ends with the block.

    A process that is connected already stays so.

    Raises:
        BatchError: no Ray answers at the address.
    """
    ours = not ray.is_initialized()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray Data makes its core warn, in red, of every actor pool that it starts; errors come as exceptions anyway.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for logger in ("ray", "ray.data"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        if ours:
            with _unsaid(), _own_sigterm():
                _connect(config)
        yield RayExecutor(config)
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _unsaid() -> Iterator[None]:
    """What Ray's core writes to stderr by itself as it starts: that it was told to be quiet. Errors are raised."""
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
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.ray is not None:
        try:
            ray.init(address=config.ray, **quiet)
        except (ConnectionError, RayError, ValueError, RuntimeError) as error:
            raise BatchError(f"no Ray answers at {config.ray!r}: {error}") from error
        return
    ray.init(
        address="local",
        include_dashboard=False,
        # More than there are: fractions of a CPU must always find room beside the tasks that read and plan.
        num_cpus=(os.cpu_count() or 1) + _reserved_cpus(config),
        object_store_memory=_OBJECT_STORE_BYTES,
        **quiet,
    )


def _reserved_cpus(config: BatchConfig) -> int:
    """Logical CPUs for the hosts, and one to spare."""
    return math.ceil(config.hosts.replicas.max * config.hosts.num_cpus) + 1


def _map(
    count: int, work: Callable[..., Any], pool: ActorPoolStrategy | TaskPoolStrategy, **options: Any
) -> Iterator[dict[str, Any]]:
    """Give `work` the numbers 0 to count - 1, in order, one at a time; yield what it reports, as it comes."""
    if not count:
        return
    numbers = ray.data.from_items([{"number": i} for i in range(count)], override_num_blocks=count)
    context = numbers.context
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # a report leaves its task when it is made, and not when a block is full of them
    reports = numbers.map_batches(work, batch_size=1, compute=pool, **options)
    try:
        for row in reports.iter_rows():
            yield json.loads(row["report"])
    except Exception as error:
        raise _ours(error) from error


def _ours(error: BaseException) -> Exception:
    """The error that the work raised, out of what Ray wraps it in."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, CoeError | RegistryError | RouterError) and not isinstance(seen, RayError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return BatchError(f"the batch stopped: {error}")


class _Router:
    """The actor that routes; its work is a bundle of splits."""

    def __init__(self, job: Job, bundles: Sequence[tuple[Split, ...]]) -> None:
        self._router = PartRouter(job, open_router(job.config, job.snapshot))
        self._bundles = bundles

    def __call__(self, batch: _Batch) -> Iterator[_Batch]:
        for number in batch["number"]:
            for stepped in self._router.route(self._bundles[number]):
                yield _report(asdict(stepped))


def _step(batch: _Batch, job: Job, stage: int, parts: Sequence[int]) -> Iterator[_Batch]:
    for number in batch["number"]:
        yield _report(asdict(step_part(job, parts[number], stage)))


class _HostActor:
    """The actor that answers; its work is a item a turn. The host lives on an event loop of its own between items.

    claims: the actor that says which item it is, and which one to expect (`claims.Claims`).
    """

    def __init__(self, job: Job, stage: int, items: Sequence[WorkItem], claims: Any, most_deaths: int) -> None:
        self._job, self._stage, self._items, self._claims = job, stage, items, claims
        self._name = uuid.uuid4().hex
        self._gives_up = self._died_too_often(most_deaths)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="host", daemon=True).start()
        self._stack = AsyncExitStack()
        opened = self._stack.enter_async_context(open_host(job.config, job.snapshot))
        self._host = asyncio.run_coroutine_threadsafe(opened, self._loop).result()
        self._loads = LoadCounter(self._host)

    def _died_too_often(self, most: int) -> bool:
        """Note that this actor stands in for one that died, and whether so many did that it is better to stop."""
        context = ray.get_runtime_context()
        deaths = f"{PARTS}/deaths/{context.get_job_id()}/{self._stage}"
        if context.was_current_actor_reconstructed:
            with self._job.folder.write(f"{deaths}/{uuid.uuid4().hex}"):
                pass
        return len(self._job.folder.names(deaths)) > most

    def __call__(self, batch: _Batch) -> Iterator[_Batch]:
        if self._gives_up:
            return  # Ray would drop an error here, as told already by the one that died; the run sees what is missing
        for turn in batch["number"]:
            reports: queue.SimpleQueue[WorkReport | None] = queue.SimpleQueue()
            item = self._shift(int(turn), reports.put)
            running = asyncio.run_coroutine_threadsafe(item.run(), self._loop)
            running.add_done_callback(lambda _, reports=reports: reports.put(None))  # type: ignore[misc]
            while (answered := reports.get()) is not None:
                yield _report(plain(answered))
            running.result()

    def _shift(self, turn: int, report: Callable[[WorkReport], None]) -> Answerer:
        number, following = ray.get(self._claims.claim.remote(turn, self._name))
        return Answerer(
            self._host,
            self._job.folder,
            self._stage,
            self._items[number],
            report,
            loads=self._loads,
            following=None if following is None else self._items[following][0].expert,
        )


def _report(value: dict[str, Any]) -> _Batch:
    return {"report": np.array([json.dumps(value)], dtype=object)}
