"""What servers were measured to take in memory, kept for later loads in `$COE_HOME/servers`."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from registry.digest import digest_of_text
from registry.errors import DiskFull
from registry.spec import ExpertSpec
from registry.storage import atomic_path, coe_home


def _file(spec: ExpertSpec) -> Path:
    key = spec.digest or digest_of_text("server", spec.name)
    return coe_home() / "servers" / f"{key.removeprefix('sha256:')[:32]}.json"


def remembered(spec: ExpertSpec) -> int | None:
    """Bytes that the server of this expert, with this content, took when it last ran; None if it never ran here."""
    try:
        document = json.loads(_file(spec).read_text())
        size_bytes = document["memory_bytes"]
    except (OSError, ValueError, LookupError, TypeError):  # never measured, or a damaged file: measured again
        return None
    return size_bytes if isinstance(size_bytes, int) and 0 < size_bytes < 2**60 else None


def remember(spec: ExpertSpec, memory_bytes: int) -> None:
    """Keep what it took, for the next load. Without room on the disk nothing is kept."""
    with suppress(OSError, DiskFull), atomic_path(_file(spec)) as staged:
        staged.write_text(json.dumps({"expert": spec.name, "memory_bytes": memory_bytes}))
