"""An expert that `coe init` found, on its way into an experts file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry.inspection import Facts
from registry.spec import Kind

ADAPTER_CONFIG, MODEL_CONFIG, MODULES = "adapter_config.json", "config.json", "modules.json"


_MOST_CHARACTERS = 1024


def stated_base(config: dict[str, Any]) -> str:
    """What an adapter's config calls its base: a repository or a path; empty if it is neither."""
    base = config.get("base_model_name_or_path")
    sound = isinstance(base, str) and len(base) <= _MOST_CHARACTERS and base.isprintable()
    return str(base) if sound else ""


@dataclass(slots=True)
class Found:
    """One expert for the experts file.

    Attributes:
        entry: the fields to write; `source` is absolute, `base` is set by `inspect_sources`.
        path: its files on this machine.
        comment: what the files say, for a reader.
        origin: what an adapter's config or the hub calls it, by which others refer to it.
    """

    entry: dict[str, Any]
    path: Path | None = None
    comment: str = ""
    origin: str = ""
    facts: Facts | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Its name in the file."""
        return str(self.entry["name"])

    @property
    def kind(self) -> Kind:
        """What it is."""
        return Kind(self.entry["kind"])
