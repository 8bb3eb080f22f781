"""What can be wrong with where a command reads or writes."""

from __future__ import annotations

from coe.errors import CoeError


class StorageError(CoeError):
    """A URL cannot be opened: its protocol is unknown, or the package that fsspec needs for it is missing."""

    code = "invalid_url"


class RunFolderError(CoeError):
    """The folder of a run cannot be used; the message says what to do."""

    code = "invalid_run_folder"
