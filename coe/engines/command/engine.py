"""CommandEngine: experts whose source is a command: a server is started on demand, and stopped for its memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

from coe.engines.base import Capabilities, Expert
from coe.engines.command.expert import CommandExpert
from coe.engines.command.measured import remember, remembered
from coe.engines.remote.attempts import RetrySettings
from coe.errors import ConfigError
from registry.spec import ExpertSpec

_NO_KEY: Final = "none"


class CommandEngine:
    """Starts `llama-server` or any OpenAI-compatible server for an expert (`registry.commands.ServerCommand`).

    Args:
        timeout_s: seconds without any byte after which an answer counts as lost.
        hang_timeout_s: seconds without an answer to a health check, or a piece of an answer, after which a server is
            killed and started again.
        connect_s: seconds to connect.
        environ: environment of the servers, and of the keys.
    """

    capabilities: Final = Capabilities(streaming=True, tools=True, vision=True)

    def __init__(
        self,
        timeout_s: float = 300.0,
        hang_timeout_s: float = 300.0,
        *,
        connect_s: float = 10.0,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        if min(timeout_s, hang_timeout_s, connect_s) <= 0:
            raise ConfigError("timeouts must be positive")
        self._retry = RetrySettings(timeout_s, connect_s, retries=0, backoff_s=0.0)
        self._hung_s, self._environ = hang_timeout_s, environ
        self._measured: dict[str, int | None] = {}  # by `name@version`

    def footprint(self, spec: ExpertSpec) -> int:
        """Bytes that its server took when it last ran here; before, the stated or estimated `size_bytes`."""
        if spec.server is None or not spec.server.measure:
            return spec.size_bytes or 0
        if spec.ref not in self._measured:
            self._measured[spec.ref] = remembered(spec)
        return self._measured[spec.ref] or spec.size_bytes or 0

    async def load(self, spec: ExpertSpec, path: Path) -> CommandExpert:
        """Start the server and wait until it is ready. path: the folder in which the command runs.

        Raises:
            ConfigError: the environment variable for the key is not set.
            WeightsError: the server does not start; with the last lines of its output.
        """
        key = self._key(spec)
        secrets = () if key == _NO_KEY else (key,)
        expert = CommandExpert(
            spec,
            path,
            self._environ,
            key=key,
            secrets=secrets,
            retry=self._retry,
            hung_s=self._hung_s,
            on_measured=partial(self._note, spec),
        )
        await expert.open()
        return expert

    async def unload(self, expert: Expert) -> None:
        """Stop the server, and wait until its processes are gone."""
        if not isinstance(expert, CommandExpert):
            raise TypeError(f"{expert!r} was not loaded by this engine")
        await expert.close()

    def _note(self, spec: ExpertSpec, memory_bytes: int) -> None:
        """Keep what a server has taken, for later loads; writes a file."""
        self._measured[spec.ref] = memory_bytes
        remember(spec, memory_bytes)

    def _key(self, spec: ExpertSpec) -> str:
        if spec.api_key_env is None:
            return _NO_KEY
        if not (key := self._environ.get(spec.api_key_env, "").strip()):
            raise ConfigError(f"{spec.name!r} needs a key: set the environment variable {spec.api_key_env}")
        return key
