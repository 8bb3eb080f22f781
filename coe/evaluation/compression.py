"""Compressed experts beside the original, as experts that a run can measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from coe.errors import ConfigError
from coe.evaluation.digest import json_digest
from coe.evaluation.report import Report
from coe.evaluation.tasks import Task
from coe.experts import locate
from registry.deltas.manifest import MANIFEST, PAYLOAD, is_delta
from registry.deltas.writing import Compression, write_delta
from registry.describe import describe
from registry.references import dependents
from registry.sources import has_files, resolve
from registry.spec import ExpertSpec, Kind

_TUNING_SHARE = 3
"""One row in so many chooses alpha; the others judge."""
_READ_AGAIN = {"source": "", "revision": None, "digest": None, "files": (), "restores": None, "version": None}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A compressed form of an expert.

    Attributes:
        spec: described, with a name of its own.
        folder: of its delta.
    """

    how: Compression
    spec: ExpertSpec
    folder: Path

    @property
    def size_bytes(self) -> int:
        """Bytes of the coded weights with their manifest."""
        return sum((self.folder / name).stat().st_size for name in (PAYLOAD, MANIFEST))


def base_to_compress(spec: ExpertSpec, base: str | None, experts: Mapping[str, ExpertSpec]) -> ExpertSpec | None:
    """The model whose weights an expert is stored as a difference from; None for an adapter.

    Args:
        base: the stated name.

    Raises:
        ConfigError: the expert cannot be compressed, or the base is missing or superfluous.
    """
    if not has_files(spec) or spec.kind not in (Kind.MODEL, Kind.ADAPTER):
        raise ConfigError(f"{spec.ref} ({spec.kind.value}) cannot be compressed: it has no weights of its own")
    path = resolve(spec)
    if is_delta(path):
        raise ConfigError(f"{spec.ref} is compressed already: its source is the delta {path}")
    if path.is_file():
        raise ConfigError(f"{spec.ref} is a GGUF file, whose weights are packed already")
    if spec.kind is Kind.ADAPTER:
        if base not in (None, spec.base):
            raise ConfigError(f"{spec.ref} is an adapter, whose own weights are compressed: leave --base out")
        return None
    if needed := [name for name in dependents(experts, spec.name) if experts[name].delta_base]:
        raise ConfigError(f"{spec.ref} cannot be a delta: {', '.join(needed)} are stored as differences from it")
    if base is None:
        raise ConfigError(f"name the model that {spec.ref} was fine-tuned from: --base NAME")
    if base not in experts or base == spec.name:
        known = ", ".join(name for name, other in experts.items() if other.kind is Kind.MODEL and name != spec.name)
        raise ConfigError(f"--base {base}: there is no such other model; models here: {known or 'none'}")
    return experts[base]


def compress(
    spec: ExpertSpec,
    base: ExpertSpec | None,
    how: Compression,
    out: Path,
    experts: Mapping[str, ExpertSpec],
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Candidate:
    """Write the delta of an expert into the new folder `out`, and describe it as an expert.

    Raises:
        SourceError, DigestMismatch: files are missing or damaged, or not the registered ones.
        DiskFull: no space left.
        ConfigError: the base has no weights in common with the expert.
    """
    out.mkdir(parents=True)
    folder = locate(spec, experts)
    assert spec.digest is not None  # has_files
    delta = write_delta(
        folder,
        out,
        how,
        expert=spec.digest,
        base=None if base is None else locate(base.model_copy(update={"engine": "hf"}), experts),
        base_digest=None if base is None else base.digest,
        on_bytes=on_bytes,
    )
    if base is not None and delta.base is None:
        raise ConfigError(
            f"{base.ref} shares no weight of the same name, shape and type with {spec.ref}, which was not fine-tuned "
            "from it: nothing was changed; name its own base with --base"
        )
    label = "exact" if how.density is None else f"compeft-{how.density:g}-{how.alpha:g}"
    described = registered_as(spec, base, str(out), experts)
    return Candidate(how, described.model_copy(update={"name": f"{spec.name[:90]}/{label}"}), out)


def registered_as(
    spec: ExpertSpec, base: ExpertSpec | None, source: str, experts: Mapping[str, ExpertSpec]
) -> ExpertSpec:
    """The expert as it is described with a delta as its source."""
    draft = spec.model_copy(update=_READ_AGAIN | {"source": source, "delta_base": None if base is None else base.name})
    return describe(draft, experts[spec.base] if spec.base else None, experts=experts)


def rows_of(tasks: Iterable[Task], *, tuning: bool) -> list[Task]:
    """The rows that choose alpha (every third), or those that judge the choice."""
    return [_with_rows(task, lambda i: (i % _TUNING_SHARE == 0) == tuning) for task in tasks]


def mean_score(report: Report, name: str, tasks: Iterable[Task]) -> float:
    """Mean score of an expert on the rows of these tasks, which the report has; in [0, 1]."""
    scores = [report.records[name, task.name, row.id].score for task in tasks for row in task.rows]
    return sum(scores) / len(scores)


def _with_rows(task: Task, wanted: Callable[[int], bool]) -> Task:
    rows = tuple(row for number, row in enumerate(task.rows) if wanted(number))
    return replace(task, rows=rows, digest=json_digest([task.digest, [row.id for row in rows]]))
