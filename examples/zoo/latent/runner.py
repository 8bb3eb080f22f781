"""One run: train what the method trains, answer every row, measure a query alone, write the result."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from coe.config import Config
from coe.host import Host
from coe.hosting import open_host
from coe.orchestrator import Orchestrator
from examples.zoo.families import Split
from examples.zoo.latent import latent_runs, text_rivals
from examples.zoo.latent.asking import Answers, answer_all, remembering, seconds_alone
from examples.zoo.latent.benches import Bench
from examples.zoo.latent.clock import Clock
from examples.zoo.latent.methods import BEST, ROUTED, Method, Trains
from examples.zoo.latent.plan import Run
from examples.zoo.latent.results import Result, Training, read_result, write_result
from examples.zoo.latent.service import adapter, composed, service
from examples.zoo.latent.text_rivals import Fitted, Rows, rows_of, with_answers
from examples.zoo.latent.ways import Way, way_of
from examples.zoo.remembered import dtype_of
from examples.zoo.two_skills import policies
from registry.storage import atomic_path

Report = Callable[[str], None]
_FITTED: Final = "fitted.json"


def execute(run: Run, folder: Path, clock: Clock, report: Report) -> Result:
    """Make a run in `folder / run.id`, or go on with it; answers of the zoo's experts are shared by all runs.

    Raises:
        OutOfTime: what is done is kept, and the next call goes on.
    """
    target, memory = folder / run.id, folder / "answers.jsonl"
    target.mkdir(parents=True, exist_ok=True)
    fitted = _fitted(run, target, memory, clock, report)
    result = asyncio.run(_measured(run, folder, fitted, clock, report))
    write_result(target, result)
    return result


@asynccontextmanager
async def opened(run: Run, folder: Path) -> AsyncIterator[tuple[Way, Orchestrator]]:
    """How a finished run answers, and its experts, which answer every call themselves.

    Raises:
        ValueError: the run is not finished.
    """
    target = folder / run.id
    result = read_result(target)
    if result is None:
        raise ValueError(f"{run.id} is not finished: python -m examples.zoo.latent list")
    fitted = None if run.method.trains is Trains.NOTHING else _kept(target)
    config = _service(run, target, fitted)
    async with open_host(config) as host:
        yield way_of(run.method, run.bench, best=result.expert), _orchestrator(host, run.method, config)


async def _measured(run: Run, folder: Path, fitted: Fitted | None, clock: Clock, report: Report) -> Result:
    target, memory = folder / run.id, folder / "answers.jsonl"
    answers = Answers(target / "answers.jsonl")
    config = _service(run, target, fitted)
    async with open_host(config) as host:
        asking = _orchestrator(host, run.method, config, memory)
        best = await _best(run.bench, asking, folder, clock, report) if run.method.name == BEST else None
        way = way_of(run.method, run.bench, best=best)
        await answer_all(run.bench, run.bench.rows, way, asking, answers, clock, report)
        clock.check()
        seconds = await seconds_alone(run.bench, way, _orchestrator(host, run.method, config))
    return _result(run, answers, fitted, seconds, best)


def _fitted(run: Run, target: Path, memory: Path, clock: Clock, report: Report) -> Fitted | None:
    """What the method trains, trained now unless an earlier call did."""
    if run.method.trains is Trains.NOTHING:
        return None
    done = target / _FITTED
    if not done.exists():
        rows = rows_of(run.bench, run.seed)
        if run.method.shows_answers:
            rows = asyncio.run(_shown(run, rows, target, memory, clock, report))
        fit = text_rivals.fit if run.method.trains is Trains.LORA else latent_runs.fit
        fitted = fit(run.bench, run.method, run.seed, rows, target, clock, report)
        with atomic_path(done) as path:
            path.write_text(json.dumps(asdict(fitted) | {"folder": fitted.folder.name}), encoding="utf-8")
    return _kept(target)


def _kept(target: Path) -> Fitted:
    facts: dict[str, Any] = json.loads((target / _FITTED).read_text(encoding="utf-8"))
    return Fitted(**facts | {"folder": target / facts["folder"]})


async def _shown(run: Run, rows: Rows, target: Path, memory: Path, clock: Clock, report: Report) -> Rows:
    config = service(target, run.bench.members)
    async with open_host(config) as host:
        return await with_answers(run.bench, rows, _orchestrator(host, run.method, config, memory), clock, report)


def _service(run: Run, target: Path, fitted: Fitted | None) -> Config:
    if run.method.preset is not None:
        method, artifact = run.method, None if fitted is None else fitted.folder
        assert method.architecture is not None
        entry = composed(method.architecture, method.members(run.bench), artifact, method.settings)
        return service(target, run.bench.members, *latent_runs.extra_experts(method), entry)
    if fitted is not None:
        base, _ = text_rivals.base_and_start(run.bench, run.method)
        return service(target, run.bench.members, adapter(base, fitted.folder))
    return service(target, run.bench.members)


def _orchestrator(host: Host, method: Method, config: Config, memory: Path | None = None) -> Orchestrator:
    """An orchestrator over a host of this configuration, whose experts remember their answers if `memory` is a file."""
    ways = policies(1) if method.name == ROUTED else {}
    ask = host.ask if memory is None else remembering(host, dtype_of(config), memory)
    return Orchestrator(host.snapshot, ways, ask=ask)


async def _best(bench: Bench, asking: Orchestrator, folder: Path, clock: Clock, report: Report) -> str:
    """The member with the most right answers to the validation rows; the first of equals."""
    shares = {}
    for member in bench.members:
        answers = Answers(folder / bench.name / BEST / "members" / f"{member}.jsonl")
        await answer_all(bench, [Split.VALID], Way((member,)), asking, answers, clock)
        scores = [scored.score for family in bench.families for scored in answers.of(Split.VALID, family.name)]
        shares[member] = sum(scores) / len(scores)
        report(f"{member}: {shares[member]:.1%} of the validation rows")
    return max(shares, key=lambda member: shares[member])


def _result(run: Run, answers: Answers, fitted: Fitted | None, seconds: float, best: str | None) -> Result:
    names = [family.name for family in run.bench.families]
    scores = {
        str(split): {name: [scored.score for scored in answers.of(split, name)] for name in names}
        for split in run.bench.rows
    }
    tested = [scored for name in names for scored in answers.of(Split.TEST, name)]
    n = len(tested)
    return Result(
        run.bench.name,
        run.method.name,
        run.seed,
        scores,
        prompt_tokens=sum(scored.prompt_tokens for scored in tested) / n,
        completion_tokens=sum(scored.completion_tokens for scored in tested) / n,
        flops=sum(scored.flops for scored in tested) / n,
        seconds=seconds,
        training=None if fitted is None else Training(fitted.seconds, fitted.parameters, fitted.loss),
        expert=best,
    )
