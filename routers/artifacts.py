"""Saved routers: a folder with `router.safetensors` (arrays) and `router.json` (all else). Never a pickle.

`router.json` records what the router was trained on: the experts with their digests, the encoder with its digest, the
mean scores of the experts on the training table (so that a later evaluation knows the best single expert *of the
training data*), and a digest over both files, which `load` checks.

scikit-learn and torch fit routers, NumPy predicts: an artifact holds arrays only. A tree, for instance, is five arrays
and a walk of twenty lines, which is also faster for one query than the library that grew it.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.plugins import only_modules
from registry.spelling import question
from registry.storage import atomic_directory, sha256_file
from routers.base import RouterState
from routers.encoders.build import Encoder, build_encoder
from routers.errors import InvalidArtifact, RouterError, StaleArtifactWarning, UnknownRouterKind
from routers.factory import TrainableRouter, kind_of, router_class
from routers.outcomes.reference import Reference
from routers.outcomes.table import OutcomeTable

FORMAT = 2
ARRAYS, META = "router.safetensors", "router.json"
_TRAINING_IDS = "training_ids"


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """The encoder that a router was trained with."""

    name: str
    digest: str
    dim: int


@dataclass(frozen=True, slots=True)
class ArtifactMeta:
    """The metadata of a saved router.

    Attributes:
        experts: name -> digest of the files that the outcomes were measured on; `None` if unknown.
        encoder: `None` for a router that reads no text.
        reference: summary of the training table.
        training_ids_digest: `Reference.ids_digest` of the training table.
        prices: the prices that costs were computed from; `None` if costs were recorded or unknown.
        created: UTC, ISO 8601.
        digest: `sha256:...` over both files.
        solved: the cost weight that training solved for a target, with its out-of-fold results
            (`routers.evaluation.cost_weight.Solution`); `None` without a target.
        policy: settings of a policy that training solved for a number of calls: `select`, and `composition` for a
            cascade; `None` without one.
    """

    kind: str
    experts: Mapping[str, str | None]
    encoder: EncoderInfo | None
    reference: Reference
    training_ids_digest: str
    n_queries: int
    prices: Mapping[str, Any] | None
    created: str
    digest: str
    solved: Mapping[str, Any] | None = None
    policy: Mapping[str, Any] | None = None

    @property
    def cost_weight(self) -> float:
        """Default quality given up per USD: the solved cost weight, or 0."""
        return 0.0 if self.solved is None else float(self.solved["cost_weight"])


@dataclass(frozen=True, slots=True)
class LoadedRouter:
    """A router loaded from disk, with the metadata of its artifact."""

    router: TrainableRouter
    meta: ArtifactMeta


def save(
    router: TrainableRouter,
    folder: Path | str,
    *,
    table: OutcomeTable | Reference,
    encoder: Encoder | None,
    digests: Mapping[str, str | None] | None = None,
    prices: Mapping[str, Any] | None = None,
    solved: Mapping[str, Any] | None = None,
    policy: Mapping[str, Any] | None = None,
) -> str:
    """Write a fitted router atomically; an existing folder of that name is replaced.

    Args:
        table: the training table; its `Reference` if the table itself is gone, as after an update.
        encoder: the encoder that the router was trained with; `None` for a router that reads no text.
        digests: expert -> digest of its files, if known.
        prices: JSON values, stored as given.
        solved: `Solution.to_json` of the cost weight that was solved for a target.
        policy: JSON values; see `ArtifactMeta`.

    Returns:
        The artifact's digest.

    Raises:
        RouterError: the settings of the router are not JSON values.
    """
    from safetensors.numpy import save_file

    reference = table if isinstance(table, Reference) else Reference.of(table.with_experts(router.experts))
    state = router.state()
    known = digests or {}
    document = {
        "format": FORMAT,
        "kind": kind_of(router),
        "settings": dict(state.settings),
        "experts": {name: known.get(name) for name in router.experts},
        "encoder": encoder and {"name": encoder.name, "digest": encoder.digest, "dim": encoder.dim},
        "reference": reference.to_json(),
        "training_ids_digest": reference.ids_digest(),
        "n_queries": len(reference.ids),
        "prices": prices,
        "solved": solved,
        "policy": policy,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    arrays = {name: np.ascontiguousarray(array) for name, array in state.arrays.items()}
    with atomic_directory(Path(folder)) as staged:
        save_file({**arrays, _TRAINING_IDS: reference.ids}, staged / ARRAYS)
        document["arrays_digest"] = f"sha256:{sha256_file(staged / ARRAYS)}"
        document["digest"] = _digest(document)
        (staged / META).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return str(document["digest"])


def load(
    folder: Path | str,
    *,
    experts: Mapping[str, str | None] | None = None,
    make_encoder: Callable[[str], Encoder] = build_encoder,
    plugins: Collection[str] = (),
) -> LoadedRouter:
    """Load and check a saved router.

    Only built-in kinds, kinds of installed packages (entry points), and `module:Class` of modules in `plugins` or
    `$COE_PLUGINS` are imported, since the folder may come from an untrusted source.

    Args:
        experts: name -> digest of the available experts; `None` skips the check.
        make_encoder: name -> encoder, to share an encoder between routers or to cache embeddings.
        plugins: modules that the artifact may name as `module:Class`; a package includes its submodules.

    Raises:
        InvalidArtifact: a file is missing, altered or truncated, the encoder differs, or the router names an expert
            that is not available.

    Warns:
        StaleArtifactWarning: an expert has another digest than in training.
    """
    source = Path(folder)
    document = _read_document(source)
    arrays = _read_arrays(source, document)
    meta = _meta(document, arrays.pop(_TRAINING_IDS))
    if experts is not None:
        _check_experts(meta, experts, source)
    state = RouterState(arrays, document["settings"])
    try:
        with only_modules(plugins):  # also for the kinds that `guarded` and `auto` hold
            kind = router_class(meta.kind)
            return LoadedRouter(kind.from_state(state, _encoder(meta, make_encoder, source)), meta)
    except UnknownRouterKind as error:
        raise InvalidArtifact(f"{source / META}: {error}") from error


def _read_document(source: Path) -> dict[str, Any]:
    for name in (META, ARRAYS):
        if not (source / name).is_file():
            raise InvalidArtifact(f"{source} is not a saved router: it has no {name} (`coe router train` makes one)")
    try:
        document = json.loads((source / META).read_text(encoding="utf-8"))
        found, intact = document["format"], document["digest"] == _digest(document)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidArtifact(
            f"{source / META} is truncated or not that of a router: train the router again"
        ) from error
    if found != FORMAT:
        raise InvalidArtifact(
            f"{source / META} has format {found}, but this version reads {FORMAT}: train the router again"
        )
    if not intact:
        raise InvalidArtifact(f"{source / META} has been altered (its digest does not match): train the router again")
    return dict(document)


def _read_arrays(source: Path, document: dict[str, Any]) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load_file

    if document["arrays_digest"] != f"sha256:{sha256_file(source / ARRAYS)}":
        raise InvalidArtifact(f"{source / ARRAYS} is truncated or has been altered: train the router again")
    return dict(load_file(source / ARRAYS))


def _digest(document: Mapping[str, Any]) -> str:
    """Digest over the document without its own digest; `arrays_digest` in the document covers the other file."""
    rest = {name: value for name, value in document.items() if name != "digest"}
    try:
        text = json.dumps(rest, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RouterError(f"a {document['kind']} router cannot be saved, its settings are not JSON: {error}") from error
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _meta(document: Mapping[str, Any], training_ids: NDArray[np.uint64]) -> ArtifactMeta:
    encoder = document["encoder"]
    return ArtifactMeta(
        kind=document["kind"],
        experts=document["experts"],
        encoder=None if encoder is None else EncoderInfo(**encoder),
        reference=Reference.from_json(document["reference"], training_ids),
        training_ids_digest=document["training_ids_digest"],
        n_queries=document["n_queries"],
        prices=document["prices"],
        created=document["created"],
        digest=document["digest"],
        solved=document.get("solved"),
        policy=document.get("policy"),
    )


def _check_experts(meta: ArtifactMeta, experts: Mapping[str, str | None], source: Path) -> None:
    missing = [name for name in meta.experts if name not in experts]
    if missing:
        hints = {name: question(name, experts) for name in missing}
        shown = (f"{name!r} ({hint})" if hint else repr(name) for name, hint in hints.items())
        raise InvalidArtifact(
            f"the router in {source} sends queries to experts that are not registered: {', '.join(shown)}. "
            "Add these experts to the registry or the experts file, or train the router without them (`--experts`)"
        )
    for name, trained_on in meta.experts.items():
        if trained_on is not None and experts[name] is not None and experts[name] != trained_on:
            warnings.warn(
                f"the files of {name!r} changed since the router in {source} was trained: measure the expert, then "
                "train the router again",
                StaleArtifactWarning,
                stacklevel=3,
            )


def _encoder(meta: ArtifactMeta, make: Callable[[str], Encoder], source: Path) -> Encoder | None:
    if meta.encoder is None:
        return None
    encoder = make(meta.encoder.name)
    if encoder.digest != meta.encoder.digest:
        raise InvalidArtifact(
            f"the router in {source} was trained with encoder {meta.encoder.name!r} ({meta.encoder.digest[:19]}, "
            f"{meta.encoder.dim} dimensions), not with {encoder.name!r} ({encoder.digest[:19]}): load it with the "
            "first encoder, or train it again with the second"
        )
    return encoder
