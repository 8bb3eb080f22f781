"""Seconds of finished runs: queries in turns, and ratios query by query."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coe.orchestrator import Orchestrator
from coe.types import Chunk, GenerateRequest, Usage
from examples.zoo.families import Split
from examples.zoo.latent import timing
from examples.zoo.latent.__main__ import app
from examples.zoo.latent.benches import BENCHES, CODES_BENCH
from examples.zoo.latent.methods import METHODS
from examples.zoo.latent.plan import Run
from examples.zoo.latent.timing import Times, table, times_of
from examples.zoo.latent.ways import Way
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot


async def test_every_method_is_asked_every_query_and_begins_in_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[tuple[str, str]]()

    @asynccontextmanager
    async def opened(run: Run, folder: Path) -> AsyncIterator[tuple[Way, Orchestrator]]:
        async def ask(expert: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
            asked.append((run.method.name, request.messages[-1].content))
            yield Chunk("yes", "stop", Usage(1, 1))

        spec = ExpertSpec(name="smollm2", kind=Kind.MODEL, source="fake://echo", digest="sha256:1")
        yield Way(("smollm2",)), Orchestrator(Snapshot(version=1, experts={"smollm2": spec}), {}, ask=ask)

    monkeypatch.setattr(timing, "opened", opened)
    runs = [Run(CODES_BENCH, METHODS[name], 1) for name in ("direct", "cache")]
    found = await times_of(runs, tmp_path, 4)
    assert {name: (len(each.wall), len(each.cpu)) for name, each in found.items()} == {
        "direct": (4, 4),
        "cache": (4, 4),
    }
    families = list(CODES_BENCH.scored(Split.TEST).values())
    prompts = [families[0][0], families[1][0], families[2][0], families[0][1]]
    loaded, counted = asked[:2], asked[2:]
    assert [name for name, _ in loaded] == ["direct", "cache"]
    assert [name for name, _ in counted] == ["direct", "cache", "cache", "direct"] * 2
    assert [prompt for _, prompt in counted[::2]] == [row.prompt for row in prompts]
    with pytest.raises(ValueError, match="on one bench"):
        await times_of([runs[0], Run(BENCHES["bookings"], METHODS["direct"], 1)], tmp_path, 4)


def test_ratios_are_medians_over_queries() -> None:
    found = {"direct": Times([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]), "cache": Times([2.0, 2.0, 40.0], [0.5, 0.5, 9.0])}
    assert table(found, "direct").splitlines()[2:] == [
        "| direct | 2.00 | 1.00 | 1.00 | 1.00 |",
        "| cache | 2.00 | 0.50 | 2.00 | 0.50 |",
    ]


def test_the_command_needs_runs_that_are_done(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["time", "--bench", "codes", "--folder", str(tmp_path)])
    assert (found.exit_code, "no run is done yet" in found.output) == (1, True)
