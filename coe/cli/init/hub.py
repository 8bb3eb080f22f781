"""What a repository on the Hugging Face hub is: a model, or a LoRA adapter of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coe.cli.init.found import ADAPTER_CONFIG, Found, stated_base
from registry.errors import SourceError
from registry.headers import read_json
from registry.sources import hub_match, names_gguf
from registry.spec import Kind


def describe_repository(source: str, timeout_s: float) -> tuple[Found, list[str]]:
    """The expert of `hf://org/name[/file.gguf][@revision]`; a note where the hub does not answer.

    Raises:
        SourceError: the source is malformed, or the hub has no such repository.
    """
    hub_match(source)
    path, _, revision = source.removeprefix("hf://").partition("@")
    repository = "/".join(path.split("/")[:2])
    entry: dict[str, Any] = {
        "name": Path(path).stem if names_gguf(path) else Path(path).name,
        "kind": Kind.MODEL.value,
        "source": source,
    }
    found = Found(entry, comment="downloaded at the first start", origin=path)
    if names_gguf(path):
        return found, []
    files = _files(repository, revision or None, timeout_s)
    if files is None:
        return found, [
            f"the Hugging Face hub does not answer: {repository} is taken as a model (an adapter needs `base`)"
        ]
    if ADAPTER_CONFIG in files:
        found.entry["kind"], found.origin = Kind.ADAPTER.value, _base_of(repository, revision or None)
    return found, []


def _files(repository: str, revision: str | None, timeout_s: float) -> set[str] | None:
    """Names of the repository's files; `None` where the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        siblings = HfApi().model_info(repository, revision=revision, timeout=timeout_s).siblings
    except RepositoryNotFoundError:
        raise SourceError("the Hugging Face hub has no such repository, or it is private: set HF_TOKEN") from None
    except HFValidationError as error:
        raise SourceError(f"{repository!r} is not a repository on the Hugging Face hub: {error}") from None
    except (OSError, OfflineModeIsEnabled, HTTPError):
        return None
    return {one.rfilename for one in siblings or ()}


def _base_of(repository: str, revision: str | None) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        config = hf_hub_download(repository, ADAPTER_CONFIG, revision=revision)
    except (OSError, ValueError, HTTPError) as error:
        raise SourceError(f"the {ADAPTER_CONFIG} of {repository} cannot be downloaded: {error}") from None
    return stated_base(read_json(Path(config)))
