"""LastGood: copies of the routers that a gateway has loaded, for a restart after their folders have gone or changed.

A gateway that restarts gets the latest catalog from Ray Serve, but routers are read from the folders that its policies
name. Without a copy, a folder that has gone since would leave the gateway without the policy.

    $COE_HOME/serve/routers/<hash of the folder's path>/     the two files of a saved router

A copy is written atomically, and `routers.artifacts.load` checks its digests like those of the folder itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from registry.errors import RegistryError
from registry.storage import atomic_directory, coe_home
from routers.artifacts import ARRAYS, META

KEPT: Final = 32
"""Most routers that are kept; the ones that were used longest ago are removed."""
MOST_BYTES: Final = 2**30
"""Most bytes of a router that is kept."""
log = logging.getLogger("ray.serve")


class LastGood:
    """The kept routers of this machine.

    Args:
        home: folder of the copies.
    """

    def __init__(self, home: Path | None = None) -> None:
        self._home = home or coe_home() / "serve" / "routers"

    def copy_of(self, router: Path) -> Path | None:
        """The kept copy of a router's folder; None if there is none."""
        kept = self._place(router)
        return kept if (kept / META).is_file() and (kept / ARRAYS).is_file() else None

    def keep(self, router: Path) -> None:
        """Keep a router that has just been loaded. A failure is logged: the service runs without a copy."""
        kept = self._place(router)
        try:
            size = sum((router / name).stat().st_size for name in (META, ARRAYS))
            if size > MOST_BYTES:
                log.warning(
                    "%s has %d bytes; routers of more than %d are not kept for a restart", router, size, MOST_BYTES
                )
                return
            if not _same(router, kept):
                self._home.mkdir(parents=True, exist_ok=True)
                with atomic_directory(kept) as staged:
                    for name in (META, ARRAYS):
                        shutil.copyfile(router / name, staged / name)
            os.utime(kept)
            self._prune()
        except (OSError, RegistryError) as error:
            log.warning("%s cannot be kept for a restart: %s", router, error)

    def _place(self, router: Path) -> Path:
        return self._home / hashlib.sha256(str(router.absolute()).encode()).hexdigest()[:32]

    def _prune(self) -> None:
        for old in sorted(self._copies(), key=lambda path: path.stat().st_mtime_ns)[:-KEPT]:
            with suppress(FileNotFoundError):
                shutil.rmtree(old)

    def _copies(self) -> Iterator[Path]:
        return (path for path in self._home.iterdir() if path.is_dir() and not path.name.startswith("."))


def _same(router: Path, kept: Path) -> bool:
    """Whether the copy is of this content: the metadata holds the digest of both files."""
    try:
        return (kept / ARRAYS).stat().st_size == (router / ARRAYS).stat().st_size and (kept / META).read_bytes() == (
            router / META
        ).read_bytes()
    except FileNotFoundError:
        return False
