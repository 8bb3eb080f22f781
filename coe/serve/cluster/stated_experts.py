"""Experts that an admin call states: read from YAML or JSON, and refused where they need a permission that is not set.

What a spec can do beyond answering: start a program, read files of the machines of the service, import code, and send
the value of an environment variable to a URL. Each needs its word in `serve.admin_sources`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from coe.engines import ENGINES
from coe.errors import InvalidRequest
from coe.serve.http.changes import SourceNotAllowed
from registry.documents import Document, as_list, parse_document
from registry.errors import SourceError
from registry.sources import SourceKind, source_kind

MOST_CHARACTERS: Final = 2**18
"""Most characters of a text with experts: YAML takes seconds per megabyte to read."""
MOST_EXPERTS: Final = 256
"""Most experts of one text."""
_PLACE: Final = Path("/request")
"""Where problems are reported; nothing is read from there."""
_NEEDS: Final[Mapping[str, str]] = {
    "commands": "starts a program on the machines of the service",
    "files": "reads files of the machines of the service",
    "plugins": "needs an engine that is not built in",
    "secrets": "sends the value of an environment variable to its endpoint",
}


def read_experts(text: str, allowed: Collection[str]) -> Document:
    """The document of a text: one expert, or `experts:` with a list, as `coe registry apply` takes them. Blocks.

    Args:
        allowed: `serve.admin_sources`.

    Raises:
        InvalidSpec: it is not YAML or JSON.
        InvalidRequest: it is too long, or a path in it is relative.
        SourceNotAllowed: an expert needs a permission that is not among `allowed`.
    """
    if len(text) > MOST_CHARACTERS:
        raise InvalidRequest(
            f"the text has more than {MOST_CHARACTERS:,} characters; apply large files with the command"
        )
    document = parse_document(text, _PLACE)
    if isinstance(document.value, dict) and "experts" not in document.value:
        document = as_list(document, "experts")
    entries = document.value.get("experts") if isinstance(document.value, dict) else None
    if not isinstance(entries, list):
        return document  # which `plan` reports
    if len(entries) > MOST_EXPERTS:
        raise InvalidRequest(f"{len(entries):,} experts in one call; at most {MOST_EXPERTS}")
    for entry in entries:
        if isinstance(entry, dict):
            _check(entry, allowed)
    return document


def _check(entry: Mapping[str, Any], allowed: Collection[str]) -> None:
    for needed, what in _needs(entry):
        if needed not in allowed:
            raise SourceNotAllowed(
                f"the expert {str(entry.get('name'))[:128]!r} {_NEEDS[needed]} ({what}), which admin calls may not "
                f"state: register it with `coe registry apply`, or set serve.admin_sources: [{needed}] and restart"
            )
    source = entry.get("source")
    if isinstance(source, str) and source and "://" not in source and not source.startswith(("/", "~")):
        raise InvalidRequest(f"the source {source[:200]!r} is relative to no file: give an absolute path")


def _needs(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The permissions that an entry needs, each with what it states."""
    source, engine = entry.get("source"), entry.get("engine")
    if isinstance(source, dict) or "server" in entry:
        yield "commands", "source: {command: ...}"
    if isinstance(source, str) and source:
        try:
            kind = source_kind(source, engine=str(engine) if engine else None)
        except SourceError:
            kind = None  # `plan` reports it, and reads nothing
        if kind is SourceKind.COMMAND:
            yield "commands", "source"
        elif kind in (SourceKind.FOLDER, SourceKind.GGUF):
            yield "files", "source"
        elif kind is SourceKind.ENGINE:
            yield "plugins", "source"
    if engine is not None and engine != "auto" and str(engine) not in ENGINES:
        yield "plugins", "engine"
    if entry.get("api_key_env") is not None:
        yield "secrets", "api_key_env"
