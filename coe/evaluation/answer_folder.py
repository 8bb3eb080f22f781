"""The folder of an evaluation: a run folder, the answers of earlier sessions, and the outcome table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coe.evaluation.answer_log import AnswerRecord, read_log
from coe.evaluation.plan import EvaluationPlan
from coe.runs.folder import RUN, RUNNING, RunFolder, open_run_folder
from coe.runs.storage import Folder

ANSWERS, OUTCOMES = "answers.jsonl", "outcomes.parquet"


@dataclass(frozen=True, slots=True)
class AnswerFolder:
    """An open, locked folder of an evaluation.

    Attributes:
        fingerprint: the plan's, which every record has.
        records: answers of earlier sessions.
        was_cut: whether a half-written answer was dropped.
    """

    path: Path
    run: RunFolder
    fingerprint: str
    records: tuple[AnswerRecord, ...]
    was_cut: bool

    @property
    def answers(self) -> Path:
        """`answers.jsonl`: every answer, in the order of completion."""
        return self.path / ANSWERS

    @property
    def outcomes(self) -> Path:
        """`outcomes.parquet`: the outcome table, written when the run is complete."""
        return self.path / OUTCOMES


@contextmanager
def open_answer_folder(
    path: Path, plan: EvaluationPlan, *, resume: bool = False, discard: bool = False
) -> Iterator[AnswerFolder]:
    """Lock the folder for a plan, and read the answers that it holds.

    Args:
        resume: continue the run that the folder holds.
        discard: remove the run that the folder holds, and start a new one.

    Raises:
        RunFolderError: see `coe.runs.folder.open_run_folder`; also where answers.jsonl is damaged.
    """
    folder = Folder.of(str(path))
    with open_run_folder(
        folder,
        plan.manifest(),
        command="coe eval",
        data=[ANSWERS],
        resume=resume,
        discard=[OUTCOMES, ANSWERS, RUN] if discard else [],
    ) as run:
        fingerprint = plan.fingerprint
        records, was_cut = read_log(path / ANSWERS, fingerprint)
        if not folder.exists(RUN):  # the log must not exist without it
            run.save(RUNNING, fingerprint=fingerprint)
        yield AnswerFolder(path, run, fingerprint, tuple(records), was_cut)
