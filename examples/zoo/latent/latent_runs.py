"""Latent compositions: the file of `coe latent train` for a bench and a method, and the training itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from coe.latent.config import read_train_file
from coe.latent.training.run import train_composition
from examples.zoo.families import FAMILIES, Family, Row, Split
from examples.zoo.latent.benches import Bench
from examples.zoo.latent.clock import Clock
from examples.zoo.latent.methods import SELF, Method
from examples.zoo.latent.service import again, write_service
from examples.zoo.latent.text_rivals import Fitted, Report, Rows, families_of
from examples.zoo.plan import SCORE_SEED, TRAIN_SEED
from registry.storage import atomic_path


def extra_experts(method: Method) -> list[dict[str, Any]]:
    """Entries of members that the zoo does not list."""
    return [again(SELF)] if method.peers and SELF in method.peers else []


def write_train_file(bench: Bench, method: Method, seed: int, rows: Rows, folder: Path) -> Path:
    """Write rows, service and the file of `coe latent train` into `folder`; returns the file."""
    if method.own_rows:
        members = method.members(bench)
        rows = own_rows(bench, members, seed)
        turns = [{"member": name} for name in members]
        marks = [[turns[i % len(turns)] for i in range(len(found))] for found in (rows.train, rows.valid)]
    else:
        marks = [[_marks(bench, family) for family in found] for found in families_of(bench, rows)]
    for name, found, marked in zip(("train", "valid"), (rows.train, rows.valid), marks, strict=True):
        _write_rows(folder / f"{name}.jsonl", found, marked)
    document = {
        "preset": method.preset,
        "config": write_service(folder, bench.members, *extra_experts(method)).name,
        "members": list(method.members(bench)),
        "train": "train.jsonl",
        "valid": "valid.jsonl",
        "out": "artifact",
        "settings": dict(method.settings),
        "training": {"steps": bench.steps, "batch": bench.batch, "accumulate": 1, "seed": seed, **method.training},
    }
    with atomic_path(folder / "train.yaml") as path:
        path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return folder / "train.yaml"


def own_rows(bench: Bench, members: Sequence[str], seed: int) -> Rows:
    """As many rows as those of the bench, of its members' own families in turns."""

    def taken(split: Split, n: int, seed: int) -> list[Row]:
        per_member = [FAMILIES[name].rows(split, -(-n // len(members)), seed=seed) for name in members]
        return [row for turn in zip(*per_member, strict=True) for row in turn][:n]

    n_valid = len(bench.families) * bench.rows[Split.VALID]
    return Rows(
        taken(Split.TRAIN, bench.steps * bench.batch, TRAIN_SEED + seed), taken(Split.VALID, n_valid, SCORE_SEED)
    )


def _marks(bench: Bench, family: Family) -> dict[str, Any]:
    """The fields of a row beside prompt and answer."""
    return {"peers": list(bench.right[family.name])} if bench.right else {}


def _write_rows(file: Path, rows: Sequence[Row], marks: Sequence[Mapping[str, Any]]) -> None:
    """Rows as `coe latent train` reads them, each with its marks."""
    lines = (
        {"id": str(i), "prompt": row.prompt, "answer": row.target, **marked}
        for i, (row, marked) in enumerate(zip(rows, marks, strict=True))
    )
    with atomic_path(file) as path:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def fit(bench: Bench, method: Method, seed: int, rows: Rows, folder: Path, clock: Clock, report: Report) -> Fitted:
    """Train a composition into `folder / "artifact"` as `coe latent train` does; goes on from its last checkpoint.

    Raises:
        OutOfTime: a checkpoint is written.
        coe.errors.CoeError: the members cannot be composed, or an expert failed.
    """
    shutil.rmtree(folder / "artifact", ignore_errors=True)  # of a run that was cut off before its figures were written
    file = read_train_file(write_train_file(bench, method, seed, rows, folder))

    def after(step: int, figures: Mapping[str, float]) -> None:
        if "valid_loss" in figures:
            report(f"step {step} of {bench.steps}, validation loss {figures['valid_loss']:.3f}")
        _interrupt(clock)

    def preparing(what: str, done: int, total: int) -> None:
        if done == total:
            report(f"{what}: {total}")
        _interrupt(clock)

    try:
        trained = train_composition(
            file, on_progress=preparing, on_step=after, on_loading=lambda member: report(f"loading {member}")
        )
    except KeyboardInterrupt:
        clock.check()
        raise
    after_loss = trained.outcome.after.loss
    return Fitted(trained.artifact.path, trained.outcome.seconds, trained.n_parameters, after_loss)


def _interrupt(clock: Clock) -> None:
    """As Ctrl-C does, after which a training writes a checkpoint."""
    if not clock.left_s:
        raise KeyboardInterrupt
