"""The folder of a run: which run it holds, what each process did for it, and whether it may be resumed.

`run.json` has the `manifest` (everything that the results depend on), the `status` and the `sessions`, one for each
process that worked on the run. A new folder starts a run. A folder that holds a run needs `resume`, and the same
manifest. One process at a time works in a folder on a disk; object stores have no locks.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout

from coe.runs.errors import RunFolderError
from coe.runs.storage import Folder

RUN, _LOCK = "run.json", ".lock"
RUNNING, COMPLETE = "running", "complete"
Manifest = Mapping[str, Any]


@dataclass(slots=True)
class RunFolder:
    """An open run folder.

    Attributes:
        run: the content of run.json: manifest, status, sessions, and what else the command saves there.
        sessions: the records of earlier processes.
    """

    folder: Folder
    run: dict[str, Any]
    sessions: list[Any]

    @property
    def status(self) -> str:
        """`running`, `interrupted`, `stopped` by an error, or `complete`."""
        return str(self.run["status"])

    def save(self, status: str, session: Mapping[str, Any] | None = None, **found: Any) -> dict[str, Any]:
        """Replace run.json, and return it: the content so far, the record of this process, and `found`."""
        self.run |= {"status": status, "sessions": [*self.sessions, *([session] if session else [])], **found}
        with self.folder.write(RUN) as file:
            file.write((json.dumps(self.run, indent=2, ensure_ascii=False) + "\n").encode())
        return self.run


def status_after(error: BaseException) -> str:
    """The status of a run that ended with an error: `stopped`, or `interrupted` by a signal or a cancellation."""
    return "stopped" if isinstance(error, Exception) else "interrupted"


@contextmanager
def open_run_folder(
    folder: Folder,
    manifest: Manifest,
    *,
    command: str,
    data: Sequence[str],
    resume: bool,
    may_grow: Collection[str] = (),
    discard: Sequence[str] = (),
) -> Iterator[RunFolder]:
    """Lock the folder for the run that `manifest` describes.

    Args:
        command: the command that writes such runs, for messages.
        data: names of the files and folders that the command writes before the results.
        resume: continue the run that the folder holds.
        may_grow: parts of the manifest in which new names make no other run.
        discard: names to remove first: the run that the folder holds is given up.

    Raises:
        RunFolderError: the folder holds another run, or this one and `resume` is False; it has data without a
            run.json, or a run.json of something else; it is in use; its path is a file.
    """
    with _locked(folder):
        for name in discard:
            folder.remove(name)
        manifest = json.loads(json.dumps(manifest))  # as it is read back: tuples are lists
        earlier = _earlier_run(folder, manifest, command)
        if earlier is None:
            for name in data:
                if folder.exists(name):
                    raise RunFolderError(
                        f"{folder.url} has {name} but no {RUN}, which would say what run it is of: use another --out"
                    )
            yield RunFolder(folder, {"manifest": manifest, "status": RUNNING, "sessions": []}, [])
            return
        if differences := "; ".join(_differences(earlier["manifest"], manifest, may_grow)):
            raise RunFolderError(
                f"{folder.url} holds another run ({differences}): use another --out, or the settings of that run"
            )
        if not resume:
            raise RunFolderError(
                f"{folder.url} holds this run already ({earlier['status']}): "
                "add --resume to continue it, or use another --out"
            )
        yield RunFolder(folder, earlier, list(earlier["sessions"]))


@contextmanager
def _locked(folder: Folder) -> Iterator[None]:
    path = folder.local
    if path is None:
        yield
        return
    lock = FileLock(path / _LOCK)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except (FileExistsError, NotADirectoryError):
        raise RunFolderError(f"{path} is a file, or lies in one; name a folder with --out") from None
    except Timeout:
        raise RunFolderError(f"{path} is in use by another process; wait for it or use another --out") from None
    except OSError as error:
        raise RunFolderError(
            f"the run folder {path} cannot be used: {error.strerror or error}; name another one with --out"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _earlier_run(folder: Folder, manifest: Manifest, command: str) -> dict[str, Any] | None:
    if not folder.exists(RUN):
        return None
    with folder.open(RUN) as file:
        content = file.read()
    try:
        run: dict[str, Any] = json.loads(content)
        if run.keys() >= {"manifest", "status", "sessions"} and run["manifest"].keys() == manifest.keys():
            return run
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass
    raise RunFolderError(f"{folder.at(RUN)} was not written by `{command}`: use another --out")


def _differences(earlier: Manifest, now: Manifest, may_grow: Collection[str]) -> Iterator[str]:
    """What differs, as `experts: -removed, +added, ~changed before -> after` for each part."""
    for part, after in now.items():
        before = earlier[part]
        if not isinstance(before, dict) or not isinstance(after, dict):
            if before != after:
                yield f"{part}: {before} -> {after}"
            continue
        changes = [f"-{name}" for name in before if name not in after]
        changes += [f"+{name}" for name in after if name not in before and part not in may_grow]
        changes += [
            _change(name, before[name], after[name]) for name in after if before.get(name, after[name]) != after[name]
        ]
        if changes:
            yield f"{part}: {', '.join(changes)}"


def _change(name: str, before: object, after: object) -> str:
    shown = f"~{name}"
    return shown if isinstance(before, dict | list) else f"{shown} {str(before)[:19]} -> {str(after)[:19]}"
