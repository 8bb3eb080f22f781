"""RemoteEngine: experts behind OpenAI-compatible endpoints (OpenAI, vLLM, llama.cpp, LiteLLM, this project itself)."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from coe.engines.base import Adapter, Capabilities, Expert
from coe.engines.remote.errors import seconds_to_retry, translate
from coe.errors import ConfigError, EngineError, InvalidRequest, RemoteError
from coe.types import DEFAULT_MAX_TOKENS, Chunk, FinishReason, GenerateRequest, Usage
from registry.spec import ExpertSpec

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_NO_KEY: Final = "none"
"""Sent to endpoints without a key: the client requires one."""
_CHARACTERS_PER_TOKEN: Final = 4
_REASONS: Final[dict[str, FinishReason]] = {"stop": "stop", "length": "length", "tool_calls": "stop"}


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

    capabilities: Final = Capabilities(streaming=True)
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
            ConfigError: the environment variable for the key is not set.
        """
        from openai import AsyncOpenAI, Timeout

        client = AsyncOpenAI(
            base_url=spec.source,
            api_key=self._key(spec),
            max_retries=0,  # retried here, which knows whether text was streamed
            timeout=Timeout(self._retry.timeout_s, connect=self._retry.connect_s),
        )
        return RemoteExpert(spec, client, self._capacity, self._retry)

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
    """An expert behind an endpoint. Closing the iterator of an answer closes its HTTP stream."""

    def __init__(self, spec: ExpertSpec, client: AsyncOpenAI, capacity: int, retry: RetrySettings) -> None:
        self.spec = spec
        self.capacity = capacity
        self._client: AsyncOpenAI | None = client
        self._retry = retry

    async def close(self) -> None:
        """Close the client; running answers end with an error."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        """Yield the answer as it is received; see `Expert.generate`.

        If the endpoint reports no usage, it is estimated at one token per four characters, rounded up.

        Raises:
            RemoteError: the endpoint failed; `retryable` if the same request may succeed later.
            InvalidRequest: the endpoint rejects the request, or an adapter was given.
        """
        if adapter is not None:
            raise InvalidRequest(
                f"{self.spec.name!r} is remote and takes no adapters: serve {adapter.spec.name!r} there under its own "
                "name, and register it as a remote expert"
            )
        answer = await self._start(request)
        try:
            while (text := answer.take()) is not None:
                if text:
                    yield Chunk(text)
                with translate(self.spec, shown=True):
                    await answer.read()
            yield Chunk("", answer.reason(), answer.usage(request))
        finally:
            await answer.close()

    async def _start(self, request: GenerateRequest) -> _Answer:
        """An answer with its first text; transient failures before it are retried."""
        from stamina import AsyncRetryingCaller

        settings = self._retry
        retry = AsyncRetryingCaller(
            attempts=settings.retries + 1,
            timeout=None,
            wait_initial=settings.backoff_s,
            wait_jitter=settings.backoff_s,
        )
        with translate(self.spec, shown=False):
            return await retry(seconds_to_retry, self._first_text, request)

    async def _first_text(self, request: GenerateRequest) -> _Answer:
        if self._client is None:
            raise EngineError(f"{self.spec.name!r} was unloaded: load it again")
        answer = _Answer(self.spec, await _open(self._client, self.spec, request))
        try:
            await answer.read()
        except BaseException:
            await answer.close()
            raise
        return answer


async def _open(client: AsyncOpenAI, spec: ExpertSpec, request: GenerateRequest) -> Any:
    # Compatible servers accept `max_tokens`; OpenAI's newer models only the new name.
    host = urlsplit(spec.source).hostname or ""
    limit = "max_completion_tokens" if host.endswith(".openai.com") and request.messages else "max_tokens"
    options: dict[str, Any] = {
        "model": spec.model or spec.name,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": request.temperature,
        "top_p": request.top_p,
        limit: request.max_tokens or DEFAULT_MAX_TOKENS,
    }
    options |= {"stop": list(request.stop)} if request.stop else {}
    options |= {"seed": request.seed} if request.seed is not None else {}
    if request.prompt is not None:
        return await client.completions.create(prompt=request.prompt, **options)
    options |= {"response_format": {"type": "json_object"}} if request.format == "json" else {}
    turns: Any = [{"role": m.role, "content": m.content} for m in request.messages]
    return await client.chat.completions.create(messages=turns, **options)


class _Answer:
    """The state of one streamed answer, read event by event."""

    def __init__(self, spec: ExpertSpec, stream: Any) -> None:
        self._spec = spec
        self._stream = stream
        self._events = aiter(stream)
        self._text = ""
        self._over = False
        self._reason: str | None = None
        self._usage: Any = None
        self._n_characters = 0

    async def read(self) -> None:
        """Read events until there is text, or the stream ends."""
        while not self._text and not self._over:
            event = await anext(self._events, None)
            if event is None:
                self._end()
            else:
                self._note(event)

    def take(self) -> str | None:
        """The text read since the last call; `None` at the end."""
        text, self._text = self._text, ""
        return text if text or not self._over else None

    def _note(self, event: Any) -> None:
        self._usage = getattr(event, "usage", None) or self._usage
        for choice in event.choices[:1]:
            delta = getattr(choice, "delta", None)
            self._text += (delta.content if delta is not None else getattr(choice, "text", "")) or ""
            self._reason = choice.finish_reason or self._reason
        self._n_characters += len(self._text)

    def _end(self) -> None:
        self._over = True
        if self._reason is None:
            raise RemoteError(
                f"{self._spec.name!r} ({self._spec.source}) closed the stream before its end",
                retryable=True,
            )
        if self._reason not in _REASONS:
            raise RemoteError(f"{self._spec.name!r} ({self._spec.source}) ended with finish_reason {self._reason!r}")

    def reason(self) -> FinishReason:
        return _REASONS[self._reason or ""]

    def usage(self, request: GenerateRequest) -> Usage:
        if self._usage is not None:
            return Usage(self._usage.prompt_tokens, self._usage.completion_tokens)
        n_prompt = sum(len(m.content) for m in request.messages) + len(request.prompt or "")
        return Usage(_estimate(n_prompt), _estimate(self._n_characters))

    async def close(self) -> None:
        await self._stream.close()


def _estimate(n_characters: int) -> int:
    return math.ceil(n_characters / _CHARACTERS_PER_TOKEN)
