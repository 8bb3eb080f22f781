"""The output folder: whose it is, what its sessions did, and whether it may be resumed. One process at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from filelock import FileLock, Timeout

from coe.batch.errors import BatchFolderError
from coe.batch.parts import PARTS
from coe.batch.source import Source
from coe.batch.storage import Folder
from coe.config import Config
from coe.local import describe_policy
from coe.policy import Policy
from coe.version import __version__
from registry.spec import ExpertSpec
from registry.store import Snapshot

RUN, _LOCK = "run.json", ".lock"
RUNNING, INTERRUPTED, COMPLETE = "running", "interrupted", "complete"
Manifest = Mapping[str, Any]


@dataclass(slots=True)
class RunFolder:
    """An open run folder.

    Attributes:
        run: what run.json says, `manifest` in it.
        sessions: what earlier processes did for the run.
    """

    folder: Folder
    run: dict[str, Any]
    sessions: list[Any]

    @property
    def status(self) -> str:
        """`running`, `interrupted` or `complete`."""
        return str(self.run["status"])

    def save(self, status: str, session: Mapping[str, Any], **found: Any) -> None:
        """Replace run.json: what it says already, what this process did (`session`), and what was `found`."""
        self.run |= {"status": status, "sessions": [*self.sessions, session], **found}
        with self.folder.write(RUN) as file:
            file.write((json.dumps(self.run, indent=2, ensure_ascii=False) + "\n").encode())


def manifest(
    config: Config, snapshot: Snapshot, policies: Mapping[str, Policy], source: Source, model: str
) -> Manifest:
    """What makes a run the same one: everything that its results depend on."""
    described = {name: describe_policy(policy, policies[name]) for name, policy in config.policies.items()}
    return {
        "coe": __version__,
        "input": {"sha256": source.sha256, "rows": source.rows, "parts": len(source.splits)},
        "model": model,
        "policies": described,
        "default_policy": config.default_policy,
        "engines": config.engines.model_dump(mode="json"),
        "experts": {name: _identity(spec) for name, spec in sorted(snapshot.experts.items())},
    }


@contextmanager
def open_run_folder(folder: Folder, wanted: Manifest, *, resume: bool) -> Iterator[RunFolder]:
    """Take the folder for the run that `wanted` describes.

    Raises:
        BatchFolderError: it holds a run and `resume` is not said; it holds another run; it is in use.
    """
    with _locked(folder):
        earlier = _earlier(folder)
        if earlier is None:
            if folder.names(PARTS):
                raise BatchFolderError(f"{folder.url} has parts but no {RUN} that says whose: use another --output")
            yield RunFolder(folder, {"manifest": wanted, "status": RUNNING, "sessions": []}, [])
            return
        if not resume:
            raise BatchFolderError(
                f"{folder.url} holds a run already ({earlier['status']}): "
                "add --resume to go on with it, or use another --output"
            )
        differences = "; ".join(_differences(earlier["manifest"], wanted))
        if differences:
            raise BatchFolderError(
                f"{folder.url} holds another run ({differences}): use another --output, or what it was started with"
            )
        yield RunFolder(folder, earlier, list(earlier["sessions"]))


def known_experts(snapshot: Snapshot, run: RunFolder) -> Snapshot:
    """The snapshot without experts that were registered after the run began: it goes on as it would have."""
    names = run.run["manifest"]["experts"]
    return replace(snapshot, experts={name: spec for name, spec in snapshot.experts.items() if name in names})


@contextmanager
def _locked(folder: Folder) -> Iterator[None]:
    """Keep a second process off, where the folder is on a disk; object stores have no locks."""
    path = folder.local
    if path is None:
        yield
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise BatchFolderError(f"{path} is a file; name a folder with --output") from None
    try:
        lock = FileLock(path / _LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise BatchFolderError(
            f"{path} is in use by another `coe batch`; wait for it or use another --output"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _earlier(folder: Folder) -> dict[str, Any] | None:
    if not folder.exists(RUN):
        return None
    with folder.open(RUN) as file:
        content = file.read()
    try:
        run: dict[str, Any] = json.loads(content)
        if run.keys() >= {"manifest", "status", "sessions"} and "input" in run["manifest"]:
            return run
    except (ValueError, AttributeError, TypeError):
        pass
    raise BatchFolderError(f"{folder.at(RUN)} was not written by `coe batch`: use another --output")


def _differences(earlier: Manifest, now: Manifest) -> Iterator[str]:
    """What differs, part by part. Experts that are new do not count."""
    for part, after in now.items():
        before = earlier.get(part)
        if before == after:
            continue
        if not isinstance(before, dict) or not isinstance(after, dict):
            yield f"{part}: {before} -> {after}"
            continue
        changes = [f"-{name}" for name in before if name not in after]
        changes += [f"+{name}" for name in after if name not in before and part != "experts"]
        changes += [
            _change(name, before[name], after[name]) for name in after if before.get(name, after[name]) != after[name]
        ]
        if changes:
            yield f"{part}: {', '.join(changes)}"


def _change(name: str, before: object, after: object) -> str:
    told = f"~{name}"
    return told if isinstance(before, dict | list) else f"{told} {str(before)[:19]} -> {str(after)[:19]}"


def _identity(spec: ExpertSpec) -> str:
    """Of what an expert answers and charges: its content where that is known, and its spec."""
    irrelevant = {"version", "tags", "description", "licence", "files"}
    said = spec.model_dump_json(exclude=irrelevant if spec.engine else irrelevant | {"engine"})
    return hashlib.sha256(said.encode()).hexdigest()[:16]
