"""Measure every expert on the router's training questions, and ship the outcomes: `python -m examples.zoo.measure`.

The same as `coe eval --config examples/zoo/config.yaml --tasks examples/zoo/tasks`, plus the digests of the measured
experts beside the table, so that no router is trained on the outcomes of other experts. An interrupted run resumes.
"""

from __future__ import annotations

import asyncio
import json

from coe.cli.progress import progress
from coe.config import load_config
from coe.evaluation.runner import Progress
from coe.hosting import open_host
from examples.zoo.fetch import BASES, fetch
from examples.zoo.outcomes import DIGESTS, SHIPPED, ZOO, measured_outcomes
from registry.storage import atomic_path


async def measure() -> None:
    """Measure the experts and write the shipped files."""
    async with open_host(load_config(ZOO / "config.yaml")) as host:
        with progress() as shown:
            tasks = {name: shown.add(name) for name in host.snapshot.experts}

            def show(state: Progress) -> None:
                tasks[state.expert].update(completed=state.done, total=state.total)

            table = await measured_outcomes(host, show)
        digests = {name: spec.digest for name, spec in sorted(host.snapshot.experts.items())}
    table.write(SHIPPED)
    with atomic_path(DIGESTS) as path:
        path.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for base in BASES:
        fetch(base, progress=print)
    asyncio.run(measure())
