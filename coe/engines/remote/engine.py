"""RemoteEngine: experts behind OpenAI-compatible endpoints (OpenAI, vLLM, llama.cpp, LiteLLM, this project itself)."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from coe.engines.base import Adapter, Capabilities, Expert
from coe.engines.remote.attempts import Attempts, RetrySettings
from coe.engines.remote.breaker import Breaker, BreakerSettings
from coe.engines.remote.endpoints import Endpoint, EndpointPool
from coe.engines.remote.errors import translate
from coe.errors import ConfigError, EngineError, InvalidRequest, Rejected, RemoteError
from coe.types import Chunk, GenerateRequest, Usage
from registry.endpoints import RemoteEndpoint
from registry.errors import without_userinfo
from registry.spec import ExpertSpec

_NO_KEY: Final = "none"
"""Sent to endpoints without a key: the client requires one."""
_MOST_OPEN_S: Final = 60.0
"""Most seconds between two probes of an endpoint that fails."""


class RemoteEngine:
    """Generates through endpoints. Nothing is resident, so experts take no memory.

    Args:
        timeout_s, retries, connect_s, backoff_s: see `RetrySettings`.
        capacity: requests in flight at one endpoint.
        breaker_failures, breaker_open_s: failures in a row after which an endpoint gets no requests, and for how many
            seconds at first (`coe.engines.remote.breaker`); 0 failures: never.
        environ: has the keys. clock: monotonic seconds, of the breakers.
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
        breaker_failures: int = 5,
        breaker_open_s: float = 5.0,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if capacity < 1 or min(timeout_s, connect_s, breaker_open_s) <= 0 or min(retries, backoff_s) < 0:
            raise ConfigError("timeouts must be positive, capacity at least 1, retries and backoff_s not negative")
        if breaker_failures < 0:
            raise ConfigError("breaker_failures must not be negative; 0 never avoids an endpoint")
        self._capacity, self._clock = capacity, clock
        self._breaker = BreakerSettings(breaker_failures, breaker_open_s, max(breaker_open_s, _MOST_OPEN_S))
        self._retry = RetrySettings(timeout_s, connect_s, retries, backoff_s)
        self._environ = environ

    def footprint(self, spec: ExpertSpec) -> int:
        """Always 0."""
        return 0

    async def load(self, spec: ExpertSpec, path: Path) -> RemoteExpert:
        """Create a client for each endpoint. Nothing is sent, and `path` is not read.

        Raises:
            ConfigError: the environment variable for a key is not set, or the source has a password.
        """
        if "@" in urlsplit(spec.source).netloc:
            raise ConfigError(
                f"the source of {spec.name!r}, {without_userinfo(spec.source)}, has a user name or password: register "
                "it again without, and name the environment variable with the key as `api_key_env`"
            )
        listed = spec.endpoints or (RemoteEndpoint(url=spec.source),)
        keys = [self._key(_at(spec, each)) for each in listed]
        secrets = tuple({key for key in keys if key != _NO_KEY})
        endpoints = [self._endpoint(spec, each, key, secrets) for each, key in zip(listed, keys, strict=True)]
        return RemoteExpert(spec, EndpointPool(endpoints, self._clock), self._retry)

    def _endpoint(self, spec: ExpertSpec, listed: RemoteEndpoint, key: str, secrets: tuple[str, ...]) -> Endpoint:
        from coe.engines.remote.client import open_client

        client = open_client(listed.url, key, timeout_s=self._retry.timeout_s, connect_s=self._retry.connect_s)
        limit = listed.max_in_flight or self._capacity
        return Endpoint(_at(spec, listed), client, Breaker(self._breaker), listed.weight, limit, secrets)

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


def _at(spec: ExpertSpec, listed: RemoteEndpoint) -> ExpertSpec:
    """The expert as one of its endpoints serves it."""
    place = {
        "source": listed.url,
        "model": listed.model or spec.model,
        "api_key_env": listed.key_env or spec.api_key_env,
    }
    return spec.model_copy(update=place)


class RemoteExpert:
    """An expert behind endpoints. Closing the iterator of an answer closes its HTTP stream."""

    def __init__(self, spec: ExpertSpec, pool: EndpointPool, retry: RetrySettings) -> None:
        self.spec = spec
        self._pool, self._retry = pool, retry
        self._closed = False

    @property
    def capacity(self) -> int:
        """Requests that its endpoints take at once; those that are avoided now take none."""
        return self._pool.capacity

    def unhealthy(self) -> str | None:
        """Why no endpoint takes requests now; None if one does."""
        return self._pool.problem()

    def endpoint_states(self) -> list[dict[str, Any]]:
        """The state of each endpoint (`EndpointPool.states`)."""
        return self._pool.states()

    async def close(self) -> None:
        """Close the clients; running answers end with an error."""
        if not self._closed:
            self._closed = True
            await self._pool.close()

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        """Yield the answer as it is received; see `Expert.generate`.

        If the endpoint reports no usage, it is estimated from the texts (`routers.tokens`), and marked.

        Raises:
            RemoteError: every endpoint that was tried failed; `retryable` if the same request may succeed later.
            Rejected: the endpoint rejects the request.
            DeadlineExceeded: the deadline passed before the first text.
            InvalidRequest: an adapter was given.
        """
        if adapter is not None:
            raise InvalidRequest(
                f"{self.spec.name!r} is remote and takes no adapters: serve {adapter.spec.name!r} there under its own "
                "name, and register it as a remote expert"
            )
        if self._closed:
            raise EngineError(f"{self.spec.name!r} was unloaded: load it again")
        attempts = Attempts(self._pool, self.spec, request, self._retry)
        opened = await attempts.start()
        endpoint, answer = opened.endpoint, opened.answer
        try:
            while (piece := answer.take()) is not None:
                if not piece.is_empty:
                    yield piece
                with translate(endpoint.spec, shown=True, secrets=endpoint.secrets):
                    await answer.read()
            usage = answer.usage(request)
            yield Chunk("", answer.reason, _with_failed(usage, attempts.used), notes=_notes(attempts))
        except (RemoteError, Rejected) as error:
            if isinstance(error, RemoteError):
                opened.place.failed(error)
            attempts.count(answer.reported)
            attempts.charge(error)
            raise
        finally:
            await opened.close()


def _with_failed(usage: Usage, used: Usage | None) -> Usage:
    """The usage of an answer with that of the attempts before it."""
    return usage if used is None else Usage.total((usage, used))


def _notes(attempts: Attempts) -> tuple[str, ...]:
    used = attempts.used
    if used is None:
        return ()
    tokens = used.prompt_tokens + used.completion_tokens
    return (f"{tokens} tokens of failed attempts at endpoints of {attempts.spec.name} are part of the usage",)
