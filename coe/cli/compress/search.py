"""The smallest form of an expert that keeps its quality."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from coe.cli.output import console
from coe.cli.progress import progress
from coe.cli.runs import run_in
from coe.evaluation.compression import Candidate, compress, mean_score, rows_of
from coe.evaluation.plan import Settings, plan_run
from registry.deltas.cache import forget
from registry.deltas.writing import Compression
from registry.storage import coe_home
from registry.store import Snapshot

if TYPE_CHECKING:
    from coe.config import Config
    from coe.evaluation.report import Report
    from coe.evaluation.tasks import Task
    from registry.spec import ExpertSpec


@dataclass(frozen=True, slots=True)
class Trial:
    """What a compressed form was measured with; scores in [0, 1], `None` where nothing was measured."""

    method: str
    density: float | None
    alpha: float | None
    size_bytes: int
    score_before: float | None = None
    score_after: float | None = None
    rows: int = 0
    accepted: bool = False

    @property
    def loss_points(self) -> float:
        """Quality lost, in percentage points; negative if it rose."""
        if self.score_before is None or self.score_after is None:
            return 0.0
        return 100 * (self.score_before - self.score_after)


@dataclass
class Search:
    """Tries the densities from the smallest, and keeps the first within the loss.

    Attributes:
        work: a folder for deltas that are tried.
        tasks: without any, nothing is measured.
        max_loss: percentage points.
        trials: what was tried so far.
    """

    spec: ExpertSpec
    base: ExpertSpec | None
    snapshot: Snapshot
    config: Config
    work: Path
    tasks: Sequence[Task]
    max_loss: float
    concurrency: int
    trials: list[Trial] = field(default_factory=list)

    def exact(self) -> Candidate | None:
        """The lossless form; None if measuring it shows a loss."""
        candidate = self._compressed(Compression())
        return candidate if self._judged(candidate, self.tasks) else None

    def compeft(self, densities: Sequence[float], alphas: Sequence[float]) -> Candidate | None:
        """The form of the smallest density within the loss; alpha is chosen on rows that do not judge."""
        for density in sorted(densities):
            candidates = [self._compressed(Compression(density, alpha)) for alpha in alphas]
            judging = rows_of(self.tasks, tuning=False) if len(candidates) > 1 else self.tasks
            chosen = self._tuned(candidates) if len(candidates) > 1 else candidates[0]
            if self._judged(chosen, judging):
                return chosen
            for candidate in candidates:
                shutil.rmtree(candidate.folder)
        return None

    def _compressed(self, how: Compression) -> Candidate:
        label = "exact" if how.density is None else f"compeft {how.density:.3g}, alpha {how.alpha:.3g}"
        total = 2 * (self.spec.size_bytes or 0)
        with progress(transient=True) as shown:
            task = shown.add(f"compressing {self.spec.name}: {label}", total, in_bytes=True)
            out = self.work / f"{how.method}-{how.density}-{how.alpha}"
            return compress(self.spec, self.base, how, out, self.snapshot.experts, task.advance)

    def _tuned(self, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate with the best score on the rows that tune; of equal ones, the first."""
        tasks = rows_of(self.tasks, tuning=True)
        report = self._run([each.spec for each in candidates], tasks)
        scores = [mean_score(report, each.spec.name, tasks) for each in candidates]
        for candidate, score in zip(candidates, scores, strict=True):
            console.print(f"alpha {candidate.how.alpha:g}: {score:.1%} of the rows that tune", highlight=False)
        return candidates[scores.index(max(scores))]

    def _judged(self, candidate: Candidate, tasks: Sequence[Task]) -> bool:
        how = candidate.how
        alpha = None if how.density is None else how.alpha
        trial = Trial(how.method, how.density, alpha, candidate.size_bytes, accepted=True)
        if tasks:
            report = self._run([self.spec, candidate.spec], tasks)
            before, after = (mean_score(report, spec.name, tasks) for spec in (self.spec, candidate.spec))
            rows = sum(len(task.rows) for task in tasks)
            trial = replace(trial, score_before=before, score_after=after, rows=rows)
            trial = replace(trial, accepted=trial.loss_points <= self.max_loss + 1e-9)
        self.trials.append(trial)
        return trial.accepted

    def _run(self, specs: Sequence[ExpertSpec], tasks: Sequence[Task]) -> Report:
        """Ask and grade; answers are kept by content, so that an interrupted search goes on from them."""
        experts = {**self.snapshot.experts, **{spec.name: spec for spec in specs}}
        needed = {name for spec in specs for name in (spec.name, *spec.references)}
        known = Snapshot(self.snapshot.version, {name: experts[name] for name in experts if name in needed})
        plan = plan_run(known.experts, tasks, [spec.name for spec in specs], Settings())
        folder = coe_home() / "profiles" / plan.fingerprint
        running = run_in(folder, plan, self.config, known, resume=True, concurrency=self.concurrency)
        try:
            return asyncio.run(running)
        finally:
            for spec in specs:
                forget(spec)
