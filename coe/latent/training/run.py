"""A training from its YAML file to the artifact: `coe latent train`.

While it runs, the folder `OUT.training` beside the artifact holds its checkpoint and metrics; the metrics stay there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from coe.config import Config, load_config
from coe.engines.latent.artifact import Artifact
from coe.errors import ConfigError
from coe.experts import open_snapshot
from coe.latent.config import TrainFile, trainer_class
from coe.latent.training.answer_rows import (
    FEWEST_TRAIN,
    FEWEST_VALID,
    check_apart,
    read_answer_rows,
    rows_digest,
)
from coe.latent.training.bare import FILE as BARE
from coe.latent.training.card import card_of
from coe.latent.training.checkpoint import Checkpoint
from coe.latent.training.loop import OnStep, Outcome, train
from coe.latent.training.metrics import Metrics
from coe.latent.training.search import EVALUATIONS, Search
from coe.latent.training.trainer import Job, OnLoading, OnProgress, Trainer
from registry.digest import identity
from registry.errors import SourceError
from registry.headers import read_json
from registry.storage import atomic_path
from registry.yaml_loader import shortened

_SUFFIX: Final = ".training"
_RUN: Final = "run.json"
_CHECKPOINT: Final = "checkpoint"
_LOCK: Final = "lock"


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished training.

    Attributes:
        artifact: what was written. service: the configuration of its members.
        metrics: the file of its figures.
        n_parameters: trained weights.
    """

    artifact: Artifact
    service: Config
    outcome: Outcome
    metrics: Path
    n_parameters: int


def train_composition(
    file: TrainFile, *, on_progress: OnProgress, on_step: OnStep, on_loading: OnLoading = lambda name: None
) -> Trained:
    """Train what a file describes, and write its artifact. An interrupted training is resumed.

    Args:
        file: see `coe.latent.config.read_train_file`.
        on_progress, on_loading: see `coe.latent.training.trainer.Job`.

    Raises:
        TaskError: the rows are wrong.
        ConfigError: `out` exists, members cannot be composed, or the work folder is of another run.
        CoeError: an expert failed.
    """
    out = file.config.out
    _check_is_new(file)
    job = _job(file, on_progress, on_loading)
    trainer: type[Trainer] = trainer_class(file.config.preset)
    trainer.check(job)
    with _claimed(job):
        checkpoint = Checkpoint(job.work / _CHECKPOINT)
        first_step = checkpoint.step
        objective = trainer.prepare(job)
        with Metrics(job.work, first_step=first_step) as metrics:

            def both(step: int, figures: Mapping[str, float]) -> None:
                metrics.add(step, figures)
                on_step(step, figures)

            if isinstance(objective, Search):
                outcome = objective.search(both)
            else:
                outcome = train(objective, len(job.train), file.config.training, checkpoint, on_step=both)
        n_parameters = sum(tensor.numel() for group in objective.groups() for tensor in group.tensors.values())
        artifact = objective.save(out, card_of(job, trainer, outcome, n_parameters))
        _forget(job.work)
    return Trained(artifact, job.service, outcome, metrics.path, n_parameters)


def work_folder(out: Path) -> Path:
    """The folder of an unfinished training of this artifact."""
    return out.with_name(out.name + _SUFFIX)


def _check_is_new(file: TrainFile) -> None:
    with _placed_out(file):
        exists = file.config.out.exists()
    if exists:
        place = file.document.place(("out",))
        raise ConfigError(f"{place}: {file.config.out} exists: name another folder, or remove it to train again")


@contextmanager
def _placed_out(file: TrainFile) -> Iterator[None]:
    """What makes `out` unusable in the block is a ConfigError with its line."""
    try:
        yield
    except (OSError, ValueError) as error:  # of a path with a NUL byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        place = file.document.place(("out",))
        raise ConfigError(f"{place}: {shortened(str(file.config.out))} cannot be written: {reason}") from error


def _job(file: TrainFile, on_progress: OnProgress, on_loading: OnLoading) -> Job:
    service = load_config(file.config.config)
    snapshot = open_snapshot(service)
    rows = read_answer_rows(file.config.train, fewest=FEWEST_TRAIN)
    valid = read_answer_rows(file.config.valid, fewest=FEWEST_VALID)
    check_apart(rows, valid)
    return Job(file, service, snapshot, rows, valid, work_folder(file.config.out), on_progress, on_loading)


@contextmanager
def _claimed(job: Job) -> Iterator[None]:
    """Hold the work folder, which is of this run and of no other process.

    Raises:
        ConfigError: another process is at work in it or has finished, or it is of another run.
    """
    with _placed_out(job.file):
        job.work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(job.work / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"another process is training {job.config.out}: wait for it, or interrupt it") from None
    try:
        _check_is_new(job.file)  # another process may have finished it meanwhile
        _check_run(job.work, run_identity(job))
        yield
    finally:
        lock.release()


def run_identity(job: Job) -> dict[str, Any]:
    """What determines the result: a run of another identity is not resumed."""
    config, experts = job.config, job.snapshot.experts
    return {
        "preset": config.preset,
        "members": {name: identity(experts[name], experts) for name in config.members},
        "train": rows_digest(job.train),
        "valid": rows_digest(job.valid),
        "settings": job.settings.model_dump(mode="json"),
        "training": config.training.model_dump(mode="json"),
        "engine": {"device": job.service.engines.hf.device, "dtype": job.service.engines.hf.dtype},
    }


def _check_run(work: Path, wanted: Mapping[str, Any]) -> None:
    path = work / _RUN
    if not path.is_file():
        with atomic_path(path) as staged:
            staged.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
        return
    try:
        found = read_json(path)
    except SourceError as error:
        raise ConfigError(f"{error}: remove {work} to start again") from error
    wanted = json.loads(json.dumps(wanted))
    if differs := [name for name in wanted if found.get(name) != wanted[name]]:
        raise ConfigError(
            f"{work} holds an interrupted training with other {', '.join(differs)}: restore them to go on, or remove "
            "the folder to start again"
        )


def _forget(work: Path) -> None:
    """Leave the metrics only."""
    shutil.rmtree(work / _CHECKPOINT, ignore_errors=True)
    for name in (_RUN, _LOCK, BARE, EVALUATIONS):
        (work / name).unlink(missing_ok=True)
