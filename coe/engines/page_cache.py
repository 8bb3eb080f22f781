"""The page cache of the operating system, which holds what was read from disk."""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


def read_ahead(folder: Path) -> None:
    """Start reading the weights in a folder into the page cache. Files that are not there are left to the load."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in folder.glob("*.safetensors"):
        try:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        except OSError as error:
            logger.info("%s cannot be read ahead: %s", file, error)
