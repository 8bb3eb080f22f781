"""An engine whose models are split over several GPUs, as Ray counts them; no GPU is used.

experts:
  - {name: large, kind: model, source: "large://x", engine: "parallel_engine:ParallelEngine", size_bytes: 1000}
engines:
  "parallel_engine:ParallelEngine": {tensor_parallel_size: 2}
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from coe.engines.base import Adapter, Capabilities
from coe.types import Chunk, GenerateRequest, Usage
from registry.spec import ExpertSpec


class Worker:
    """The process of one GPU."""

    def gpus(self) -> list[Any]:
        return ray.get_gpu_ids()


class ParallelExpert:
    capacity = 8

    def __init__(self, spec: ExpertSpec, workers: list[Any]) -> None:
        self.spec, self.workers = spec, workers

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        """The GPUs of the workers."""
        gpus = [str(gpu) for worker in self.workers for gpu in await worker.gpus.remote()]
        yield Chunk(" ".join(gpus), "stop", Usage(1, len(gpus)))


class ParallelEngine:
    """Starts a worker for each GPU, as vLLM does: in the bundles of the placement group of this process."""

    capabilities = Capabilities(streaming=True)

    def __init__(self, tensor_parallel_size: int = 1) -> None:
        self._size = tensor_parallel_size

    def footprint(self, spec: ExpertSpec) -> int:
        return spec.size_bytes or 0

    async def load(self, spec: ExpertSpec, path: Path) -> ParallelExpert:
        group = get_current_placement_group()
        workers = []
        for bundle, resources in enumerate(group.bundle_specs):
            if resources.get("GPU"):
                place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
                worker: Any = ray.remote(Worker)
                workers.append(worker.options(num_cpus=0, num_gpus=1, scheduling_strategy=place).remote())
        if len(workers) != self._size:
            raise RuntimeError(f"{len(workers)} GPUs are reserved for a model on {self._size}")
        return ParallelExpert(spec, workers)

    async def unload(self, expert: ParallelExpert) -> None:
        for worker in expert.workers:
            ray.kill(worker)
