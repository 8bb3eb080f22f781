"""Measure every expert on the router's training questions, and ship the outcomes: `python -m examples.zoo.measure`.

What `coe eval --config examples/zoo/config.yaml --tasks examples/zoo/tasks` does, with the digests of what was measured
beside the table, so that nobody trains a router on the outcomes of other experts. Interrupted, it goes on.
"""

from __future__ import annotations

import asyncio
import json

from coe.config import load_config
from coe.evaluation.runner import Progress
from coe.host import open_host
from examples.zoo.demo import progress
from examples.zoo.fetch import BASES, fetch
from examples.zoo.outcomes import DIGESTS, SHIPPED, ZOO, measured_outcomes
from registry.storage import atomic_path


async def measure() -> None:
    """Measure, and write the shipped files."""
    async with open_host(load_config(ZOO / "config.yaml")) as host:
        with progress() as advance:

            def show(state: Progress) -> None:
                advance(state.expert, state.done, state.total)

            table = await measured_outcomes(host, show)
        digests = {name: spec.digest for name, spec in sorted(host.snapshot.experts.items())}
    table.write(SHIPPED)
    with atomic_path(DIGESTS) as path:
        path.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for base in BASES:
        fetch(base, progress=print)
    asyncio.run(measure())
