"""A process that computes the placement of a running service: `python -m coe.cli.placement_process`.

It has an interpreter of its own, which can be ended at any time: in a thread, the solver's C++ code aborts the process
that exits beside it. The request is a pickled `(config, running)` on stdin, the reply a pickled `PlacedPools`, or the
text of an error, on stdout.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

from coe.errors import ConfigError

if TYPE_CHECKING:
    from coe.config import Config
    from coe.serve.cluster.pool_placement import PlacedPools

LIMIT_S: Final = 300.0
"""Most seconds of a computation; the solver stops itself after 20 s, twice at most."""
_NICE: Final = 10
"""Lower priority than that of the processes that answer requests."""


class PlacementProcess:
    """Computes one placement at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def compute(self, config: Config, running: Config) -> PlacedPools:
        """`place_pools` in a process of its own; waits for it.

        Raises:
            ConfigError: it failed, ended, or took more than `LIMIT_S`.
        """
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "coe.cli.placement_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # Ctrl-C of a terminal is for `coe serve`, which ends it
        )
        with process:
            self._process = process
            if self._closed:
                process.kill()
            try:
                reply, errors = process.communicate(pickle.dumps((config, running)), LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise ConfigError(f"serve.placement: computing it took more than {LIMIT_S:g} s") from None
        if process.returncode:
            last = errors.decode(errors="replace").strip().rpartition("\n")[2]
            raise ConfigError(f"serve.placement: computing it ended with exit code {process.returncode}: {last}")
        placed: PlacedPools | str = pickle.loads(reply)  # of our own child
        if isinstance(placed, str):
            raise ConfigError(placed)
        return placed

    def close(self) -> None:
        """End the process, from any thread."""
        self._closed = True
        if self._process is not None:
            self._process.kill()


def main() -> None:
    """Reply to the request on stdin."""
    from coe.cli.placed_pools import place_pools
    from coe.errors import CoeError
    from registry.errors import RegistryError

    os.nice(_NICE)
    request: tuple[Config, Config] = pickle.load(sys.stdin.buffer)  # of `coe serve`
    reply: Any
    try:
        reply = place_pools(*request)
    except (CoeError, RegistryError, OSError) as error:
        reply = str(error)
    sys.stdout.buffer.write(pickle.dumps(reply))


if __name__ == "__main__":
    main()
