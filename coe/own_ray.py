"""A Ray of this process's own, on this machine."""

from __future__ import annotations

import logging
from typing import Any, Final

from coe.errors import ConfigError
from coe.seam import text_of

ATTEMPTS: Final = 2
"""On a busy machine Ray's own processes may miss the times that they give each other, and end."""
_END_S: Final = 5.0


def start_ray(**options: Any) -> None:
    """Start Ray here, without a dashboard and without its output on the terminal.

    Args:
        options: further ones of `ray.init`.

    Raises:
        ConfigError: Ray does not start.
    """
    import psutil  # type: ignore[import-untyped]  # has no stubs of its own
    import ray

    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    others = set(psutil.Process().children(recursive=True))
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init(address="local", **quiet, **options)
            return
        except Exception as error:  # Ray raises plain ones
            ray.shutdown()
            # The processes of a start that failed would run until this one ends.
            left = [each for each in psutil.Process().children(recursive=True) if each not in others]
            for each in left:
                each.kill()
            psutil.wait_procs(left, _END_S)
            if attempt == ATTEMPTS:
                raise ConfigError(
                    f"Ray cannot be started on this machine: {text_of(error)}; its logs are in "
                    "session_latest/logs of Ray's temporary folder"
                ) from error
