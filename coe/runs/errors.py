"""What can be wrong with where a command reads or writes."""

from __future__ import annotations

from coe.errors import CoeError


class StorageError(CoeError, code="invalid_url"):
    """A URL cannot be opened: its protocol is unknown, or the package that fsspec needs for it is missing."""


class RunFolderError(CoeError, code="invalid_run_folder"):
    """The folder of a run cannot be used; the message says what to do."""
