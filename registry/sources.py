"""Where an expert's files are: a folder, a GGUF file, a repository on the Hugging Face hub, an endpoint, or nowhere.

models/smol, ~/models/smol, /models/smol.gguf    relative to the YAML file that names it
home://models/smol                               under $COE_HOME
hf://org/name[@revision]                         safetensors of a repository
hf://org/name/file.gguf[@revision]               one GGUF file of it
https://host/v1                                  an OpenAI-compatible endpoint
{command: [...]}                                 a server that is started on demand (`registry.commands`)
fake://behaviour                                 the fake engine
scheme://...                                     whatever the expert's `engine`, a plug-in, makes of it
"""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path

from registry.errors import SourceError, without_userinfo
from registry.spec import ExpertSpec
from registry.storage import coe_home, translate_disk_full

_HOME = "home://"
_HUB = re.compile(r"hf://(?P<repo>\w[\w.-]*/\w[\w.-]*)(?P<file>/[\w./ -]+(?i:\.gguf))?(@(?P<revision>[\w./-]+))?")
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md")
# Copies of the weights for other programs. Nothing executable is downloaded: no pickles, no Python.
_UNWANTED = ("consolidated*.safetensors", "original/*", "onnx/*", "openvino/*", "gguf/*")


class SourceKind(StrEnum):
    """Kind of a source; the last four have no files of the expert's own."""

    FOLDER = "folder"
    GGUF = "gguf"
    HUB = "hub"
    REMOTE = "remote"
    COMMAND = "command"
    FAKE = "fake"
    ENGINE = "engine"


_SCHEMES = {
    "http": SourceKind.REMOTE,
    "https": SourceKind.REMOTE,
    "command": SourceKind.COMMAND,
    "fake": SourceKind.FAKE,
    "hf": SourceKind.HUB,
}


def source_kind(source: str, *, engine: str | None = None) -> SourceKind:
    """The kind of a source; the `engine` of an expert may read its own schemes.

    Raises:
        SourceError: the scheme is unknown, and no engine is given that may know it.
    """
    scheme, separator, _ = source.partition("://")
    if separator and scheme in _SCHEMES:
        return _SCHEMES[scheme]
    if separator and scheme != "home":
        if engine is not None:
            return SourceKind.ENGINE
        raise SourceError(
            f"{without_userinfo(source)!r}: {scheme}:// is not a source; use a path, home://, hf://, https:// or "
            "fake://, or name the `engine` that reads it"
        )
    return SourceKind.GGUF if names_gguf(source) else SourceKind.FOLDER


def names_gguf(source: str) -> bool:
    """Whether a source ends with `.gguf`, in any case. A local GGUF file may have another name: content decides."""
    return source.lower().endswith(".gguf")


def has_files(spec: ExpertSpec) -> bool:
    """Whether the expert has its own weight files (not remote, fake, of a plug-in's scheme, or composed)."""
    kinds = (SourceKind.FOLDER, SourceKind.GGUF, SourceKind.HUB)
    return bool(spec.source) and source_kind(spec.source, engine=spec.engine) in kinds


def absolute_source(source: str, folder: Path) -> str:
    """The source in its registered form: a relative path becomes absolute, from `folder`; others stay unchanged.

    Symbolic links are resolved, except that of a file itself: in the cache of the Hugging Face hub it leads to a file
    that is named by its hash, and the digest of an expert covers the names of its files.
    """
    if not source or "://" in source:
        return source
    path = local_path(source, folder)
    is_folder = path.name in ("", "..") or (path_exists(path) and path.is_dir())
    return os.path.realpath(path) if is_folder else str(Path(os.path.realpath(path.parent), path.name))


def local_path(source: str, folder: Path | None = None) -> Path:
    """Resolve a path of a YAML file: `home://` is $COE_HOME, `~` the user's home, others are relative to `folder`.

    Raises:
        SourceError: `~name` of a user that does not exist.
    """
    if source.startswith(_HOME):
        return coe_home() / source.removeprefix(_HOME)
    try:
        return (folder or Path()) / Path(source).expanduser()
    except RuntimeError:
        raise SourceError(f"{source!r}: there is no such user") from None


def path_exists(path: Path) -> bool:
    """Whether the path exists; one that the file system cannot hold (a name that is too long) does not."""
    try:
        return path.exists()
    except OSError:
        return False


def _is_link(path: Path) -> bool:
    """Whether the path is a symbolic link; one that the file system cannot hold is not."""
    try:
        return path.is_symlink()
    except OSError:
        return False


def resolve(spec: ExpertSpec, *, download: bool = True) -> Path:
    """The folder or GGUF file of an expert on this machine; files on the hub are downloaded (resumable) if necessary.

    A folder without safetensors that holds one GGUF file is that file.

    Args:
        download: False raises SourceError for files of the hub that are not in its cache.

    Raises:
        SourceError: the path does not exist, a folder holds several GGUF files, the hub refuses or cannot be reached,
            or the expert has no files.
        DiskFull: the download does not fit.
    """
    kind = source_kind(spec.source, engine=spec.engine)
    if not has_files(spec):
        raise SourceError(f"{spec.ref} ({spec.source or 'composed'}) has no files of its own")
    if kind is SourceKind.HUB:
        return _download(spec.source, spec.revision, local_only=not download)
    path = local_path(spec.source)
    if not path_exists(path):
        target = f" (a symbolic link to {path.readlink()}, which does not exist)" if _is_link(path) else ""
        raise SourceError(f"there is no {'file' if kind is SourceKind.GGUF else 'folder'} {path}{target}")
    if path.is_dir():
        return _gguf_inside(path) or path
    if not path.is_file():
        raise SourceError(f"{path} is a pipe, socket or device, not a file or folder")
    return path


def _gguf_inside(folder: Path) -> Path | None:
    """The one GGUF file of a folder without safetensors; projectors of multimodal models do not count."""
    files = sorted(folder.iterdir()) if os.access(folder, os.R_OK) else []
    if any(file.suffix == ".safetensors" for file in files):
        return None
    named = [file for file in files if names_gguf(file.name) and not file.name.startswith((".", "mmproj"))]
    found = [file for file in named if file.is_file()]
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:3]) + (", ..." if len(found) > 3 else "")
        raise SourceError(f"{folder} holds {len(found)} GGUF files ({names}): set the source to one of them")
    return found[0] if found else None


def resolve_here(spec: ExpertSpec) -> Path | None:
    """Like `resolve`, without a download: None if the files are not on this machine. Raises SourceError likewise."""
    if has_files(spec) and source_kind(spec.source, engine=spec.engine) is SourceKind.HUB:
        try:
            return _download(spec.source, spec.revision, local_only=True)
        except SourceError:
            hub_match(spec.source)  # an invalid source is an error, not a missing file
            return None
    return resolve(spec) if is_here(spec) else None


def is_here(spec: ExpertSpec) -> bool:
    """Whether `resolve` finds the files without a download. Raises SourceError for an invalid source."""
    if not has_files(spec):
        return True
    if source_kind(spec.source) is SourceKind.HUB:
        try:
            return _download(spec.source, spec.revision, local_only=True).exists()
        except SourceError:
            hub_match(spec.source)  # an invalid source is an error, not a missing file
            return False
    return path_exists(local_path(spec.source))


def pinned(source: str, path: Path) -> tuple[str, str]:
    """A hub source without its revision, and the resolved commit (the name of its snapshot folder)."""
    found = hub_match(source)
    root = path
    for _ in (found["file"] or "").split("/")[1:]:
        root = root.parent
    return f"hf://{found['repo']}{found['file'] or ''}", root.name


def hub_match(source: str) -> re.Match[str]:
    """The parts `repo`, `file` and `revision` of a hub source. Raises SourceError if it is malformed."""
    if (found := _HUB.fullmatch(source)) is None:
        raise SourceError(f"{source!r} is not hf://org/name[/file.gguf][@revision]")
    return found


def _download(source: str, stated: str | None, *, local_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP client in use

    found = hub_match(source)
    revision = stated or found["revision"]
    if revision != (found["revision"] or revision):
        raise SourceError(f"{source!r} and revision {stated!r} name different revisions: keep one")
    file = (found["file"] or "")[1:]
    try:
        with translate_disk_full(Path(HF_HUB_CACHE, "models")):
            folder = snapshot_download(
                found["repo"],
                revision=revision,
                local_files_only=local_only,
                allow_patterns=[file] if file else list(_WANTED),
                ignore_patterns=None if file else list(_UNWANTED),
            )
    except (OSError, ValueError, HTTPError) as error:
        raise _hub_error(found["repo"], revision, error) from error
    if file and not Path(folder, file).exists():
        raise SourceError(f"{found['repo']} on the Hugging Face hub has no {file}")
    return Path(folder, file) if file else Path(folder)


def _hub_error(repo: str, revision: str | None, error: Exception) -> SourceError:
    from huggingface_hub import errors

    where = f"{repo} (revision {revision or 'main'}) on the Hugging Face hub"
    if isinstance(error, errors.GatedRepoError):
        return SourceError(f"{where} is gated: accept its terms on its page, then set HF_TOKEN")
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceError(f"{where} does not exist, or is private: check the name, or set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(f"{where}: the revision does not exist")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return SourceError(f"{where} cannot be reached (no network, or HF_HUB_OFFLINE is set), and is not in the cache")
    return SourceError(f"{where} cannot be downloaded: {error}; run the command again to resume")
