"""Which training rows the primary answers right by itself, measured once before a training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from coe.errors import ConfigError
from coe.latent.training.batches import Batch, EncodedRow
from coe.latent.training.primary import Primary
from coe.latent.training.trainer import Job
from registry.json_text import loads
from registry.storage import atomic_path

FILE: Final = "bare.json"


def rows_right_bare(primary: Primary, rows: Sequence[EncodedRow], job: Job) -> set[int]:
    """Positions of the rows whose greedy answer would be exactly the right one; kept in the work folder.

    Raises:
        ConfigError: the file in the work folder is damaged.
    """
    kept = job.work / FILE
    if kept.is_file():
        return _read(kept, len(rows))
    right: list[int] = []
    n_batch = job.config.training.batch
    with primary.bare():
        for start in range(0, len(rows), n_batch):
            some = rows[start : start + n_batch]
            is_right = primary.predict(Batch.of(some, primary.device)).right(len(some))
            right += [start + place for place, one in enumerate(is_right.tolist()) if one]
            job.on_progress("the bare primary", start + len(some), len(rows))
    with atomic_path(kept) as staged:
        staged.write_text(json.dumps(right))
    return set(right)


def _read(path: Path, n_rows: int) -> set[int]:
    try:
        found = loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): remove it to measure the bare primary again") from error
    if not isinstance(found, list) or not all(type(each) is int and 0 <= each < n_rows for each in found):
        raise ConfigError(f"{path} is damaged (it holds no row numbers): remove it to measure the bare primary again")
    return set(found)
