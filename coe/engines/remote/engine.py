"""RemoteEngine: experts behind OpenAI-compatible endpoints (OpenAI, vLLM, llama.cpp, LiteLLM, this project itself)."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from coe.engines.base import Adapter, Capabilities, Expert
from coe.engines.remote.answer import EndpointAnswer
from coe.engines.remote.body import arguments
from coe.engines.remote.errors import seconds_to_retry, translate
from coe.engines.remote.events import read_events
from coe.engines.remote.limits import Limits
from coe.errors import ConfigError, EngineError, InvalidRequest
from coe.types import Chunk, GenerateRequest
from registry.errors import without_userinfo
from registry.spec import ExpertSpec

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_NO_KEY: Final = "none"
"""Sent to endpoints without a key: the client requires one."""
_SILENCE: Final = 10
"""An answer without an event for this multiple of `timeout_s` is lost, though other bytes come."""
_SHORT_WAIT_S: Final = 2.0
"""The longest Retry-After that is waited for while a client waits: beyond it, another expert may answer."""


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """Timeouts and retries of calls to an endpoint.

    Attributes:
        timeout_s: seconds without any byte after which an answer counts as lost.
        connect_s: seconds to connect.
        retries: retries of a call that failed before its first text; streamed text is never requested again.
        backoff_s: mean wait before the first retry; it doubles. An endpoint's Retry-After takes precedence.
    """

    timeout_s: float
    connect_s: float
    retries: int
    backoff_s: float


class RemoteEngine:
    """Generates through endpoints. Nothing is resident, so experts take no memory.

    Args:
        timeout_s, retries, connect_s, backoff_s: see `RetrySettings`.
        capacity: requests in flight at one endpoint.
        environ: has the keys.
    """

    capabilities: Final = Capabilities(streaming=True, tools=True, vision=True)
    weights: Final = False

    def __init__(
        self,
        timeout_s: float = 60.0,
        retries: int = 2,
        *,
        connect_s: float = 10.0,
        backoff_s: float = 0.5,
        capacity: int = 64,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        if capacity < 1 or min(timeout_s, connect_s) <= 0 or min(retries, backoff_s) < 0:
            raise ConfigError("timeouts must be positive, capacity at least 1, retries and backoff_s not negative")
        self._capacity = capacity
        self._retry = RetrySettings(timeout_s, connect_s, retries, backoff_s)
        self._environ = environ

    def footprint(self, spec: ExpertSpec) -> int:
        """Always 0."""
        return 0

    async def load(self, spec: ExpertSpec, path: Path) -> RemoteExpert:
        """Create a client for the endpoint. Nothing is sent, and `path` is not read.

        Raises:
            ConfigError: the environment variable for the key is not set, or the source has a password.
        """
        from coe.engines.remote.client import open_client

        if "@" in urlsplit(spec.source).netloc:
            raise ConfigError(
                f"the source of {spec.name!r}, {without_userinfo(spec.source)}, has a user name or password: register "
                "it again without, and name the environment variable with the key as `api_key_env`"
            )
        key = self._key(spec)
        client = open_client(spec.source, key, timeout_s=self._retry.timeout_s, connect_s=self._retry.connect_s)
        return RemoteExpert(spec, client, self._capacity, self._retry, secrets=() if key == _NO_KEY else (key,))

    def _key(self, spec: ExpertSpec) -> str:
        if spec.api_key_env is None:
            return _NO_KEY
        if not (key := self._environ.get(spec.api_key_env, "").strip()):
            raise ConfigError(
                f"{spec.name!r} needs a key: set the environment variable {spec.api_key_env} to a key of {spec.source}"
            )
        return key

    async def unload(self, expert: Expert) -> None:
        """Close the connections."""
        if not isinstance(expert, RemoteExpert):
            raise TypeError(f"{expert!r} was not loaded by this engine")
        await expert.close()


class RemoteExpert:
    """An expert behind an endpoint. Closing the iterator of an answer closes its HTTP stream.

    secrets: texts that no message may contain.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        client: AsyncOpenAI,
        capacity: int,
        retry: RetrySettings,
        *,
        secrets: tuple[str, ...] = (),
    ) -> None:
        self.spec = spec
        self.capacity = capacity
        self._client: AsyncOpenAI | None = client
        self._retry, self._secrets = retry, secrets

    async def close(self) -> None:
        """Close the client; running answers end with an error."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        """Yield the answer as it is received; see `Expert.generate`.

        If the endpoint reports no usage, it is estimated from the texts (`routers.tokens`), and marked.

        Raises:
            RemoteError: the endpoint failed; `retryable` if the same request may succeed later.
            Rejected: the endpoint rejects the request.
            InvalidRequest: an adapter was given.
        """
        if adapter is not None:
            raise InvalidRequest(
                f"{self.spec.name!r} is remote and takes no adapters: serve {adapter.spec.name!r} there under its own "
                "name, and register it as a remote expert"
            )
        opened = await self._start(request)
        try:
            answer = opened.answer
            while (piece := answer.take()) is not None:
                if not piece.is_empty:
                    yield piece
                with translate(self.spec, shown=True, secrets=self._secrets):
                    await answer.read()
            yield Chunk("", answer.reason, answer.usage(request))
        finally:
            await opened.close()

    async def _start(self, request: GenerateRequest) -> _Opened:
        """An answer with its first piece; transient failures before it are retried while there is time."""
        from stamina import AsyncRetryingCaller

        settings = self._retry
        retry = AsyncRetryingCaller(
            attempts=settings.retries + 1,
            timeout=request.deadline_s,
            wait_initial=settings.backoff_s,
            wait_jitter=settings.backoff_s,
        )
        with translate(self.spec, shown=False, secrets=self._secrets):
            return await retry(seconds_to_retry if request.patient else _shortly, self._first_piece, request)

    async def _first_piece(self, request: GenerateRequest) -> _Opened:
        if self._client is None:
            raise EngineError(f"{self.spec.name!r} was unloaded: load it again")
        opened = await _open(self._client, self.spec, request, self._retry)
        try:
            await opened.answer.read()
        except BaseException:
            await opened.close()
            raise
        return opened


@dataclass(frozen=True, slots=True)
class _Opened:
    """An answer in progress, and its HTTP response."""

    answer: EndpointAnswer
    events: AsyncGenerator[dict[str, Any], None]
    response: Any

    async def close(self) -> None:
        async with aclosing(self.events):
            await self.response.__aexit__(None, None, None)


def _shortly(error: Exception) -> bool | float:
    """Like `seconds_to_retry`, but a long wait is none."""
    seconds = seconds_to_retry(error)
    return False if not isinstance(seconds, bool) and seconds > _SHORT_WAIT_S else seconds


async def _open(client: AsyncOpenAI, spec: ExpertSpec, request: GenerateRequest, settings: RetrySettings) -> _Opened:
    """Send the request, and return the answer before its first event."""
    from openai import Timeout

    from coe.engines.remote.client import body_of

    limits = Limits.of_request(request, silence_s=_SILENCE * settings.timeout_s)
    options = arguments(spec, request)
    if request.deadline_s is not None and request.deadline_s < settings.timeout_s:
        options["timeout"] = Timeout(request.deadline_s, connect=min(settings.connect_s, request.deadline_s))
    api: Any = client.chat.completions if request.messages else client.completions
    sent = api.with_streaming_response.create(**options)
    events = read_events(body_of(await sent.__aenter__()), limits)
    return _Opened(EndpointAnswer(events, request, limits), events, sent)
