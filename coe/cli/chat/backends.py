"""Where the answers of a conversation come from: experts in this process, or a running service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from coe.cli.chat.answering import Answering
from coe.errors import CoeError, ConfigError, RemoteError
from coe.seam import one_line
from coe.types import GenerateRequest
from routers.base import Message

CONNECT_S = 10.0
"""Seconds to connect to an endpoint."""
LIST_S = 60.0
"""Seconds to wait for an endpoint's list of models."""
ANSWER_S = 600.0
"""Seconds to wait for the next bytes of an answer; a cold expert loads before its first one."""
_MOST_NAME: Final = 256
"""Characters of a model's name."""
_MOST_SHOWN: Final = 500
"""Characters of an endpoint's error that are shown."""

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

    from coe.local import System


class Backend(Protocol):
    """Answers conversations."""

    async def models(self) -> Sequence[str]:
        """The names that `model` may have."""
        ...

    def answer(
        self, messages: Sequence[Message], model: str, settings: Mapping[str, Any], answering: Answering
    ) -> AsyncGenerator[str, None]:
        """The answer in pieces; what is known of it goes into `answering`. Raises CoeError and its kin."""
        ...


@dataclass(frozen=True, slots=True)
class LocalBackend:
    """Experts and policies of a configuration, in this process."""

    system: System

    async def models(self) -> Sequence[str]:
        """`auto`, the policies and the experts."""
        from coe.policy import AUTO
        from registry.spec import RESERVED_PREFIX

        orchestrator = self.system.orchestrator
        policies = [RESERVED_PREFIX + name for name in orchestrator.policies]
        return [*([AUTO] if policies else []), *policies, *orchestrator.snapshot.experts]

    async def answer(
        self, messages: Sequence[Message], model: str, settings: Mapping[str, Any], answering: Answering
    ) -> AsyncGenerator[str, None]:
        """See `Backend`."""
        from coe.protocol.responses import route_body

        request = GenerateRequest(messages=tuple(messages), **settings)
        reply = self.system.answer(request, model=model)
        answering.why = route_body("", reply.routed, self.system.orchestrator.snapshot.version)
        async with aclosing(reply.chunks) as chunks:
            async for chunk in chunks:
                answering.expert = reply.expert
                answering.text += chunk.text
                yield chunk.text
        assert reply.answer is not None  # the chunks ended without an error
        answering.why |= {
            "asked": reply.asked,
            "notes": reply.answer.notes,
            "cost_usd": reply.answer.cost_usd,
            "tokens": reply.answer.usage.completion_tokens,
        }


@dataclass(frozen=True, slots=True)
class RemoteBackend:
    """A running service, or any OpenAI-compatible endpoint (which does not explain its answers).

    What it sends is bounded like the answers of remote experts (`coe.engines.remote.limits`); redirects are not
    followed.
    """

    client: AsyncOpenAI
    url: str

    async def models(self) -> Sequence[str]:
        """What GET /v1/models lists, without names that are empty, too long or not printable. Raises RemoteError."""
        from openai import Timeout

        from coe.engines.remote.client import whole_body
        from coe.engines.remote.limits import MOST_LIST_BYTES

        timeout = Timeout(LIST_S, connect=CONNECT_S)
        listing = self.client.models.with_streaming_response.list(timeout=timeout)
        with _translating(self.url, LIST_S):
            async with asyncio.timeout(LIST_S), listing as response:
                body = await whole_body(response.iter_bytes(), MOST_LIST_BYTES)
        try:
            names = [model["id"] for model in json.loads(body)["data"]]
        except (LookupError, RecursionError, TypeError, ValueError) as error:
            raise RemoteError(
                f"{self.url}/models does not return a list of models: is the URL that of an OpenAI-compatible endpoint?"
            ) from error
        return [name for name in names if isinstance(name, str) and name.isprintable() and 0 < len(name) <= _MOST_NAME]

    async def answer(
        self, messages: Sequence[Message], model: str, settings: Mapping[str, Any], answering: Answering
    ) -> AsyncGenerator[str, None]:
        """See `Backend`."""
        from coe.cli.chat.stream import limits_of, read_answer
        from coe.engines.remote.client import body_of

        conversation: Any = [{"role": message.role, "content": message.content} for message in messages]
        given = {name: value for name, value in settings.items() if value is not None}
        sent = self.client.chat.completions.with_streaming_response.create(
            model=model,
            messages=conversation,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"x-coe-debug": "true"},
            **given,
        )
        with _translating(self.url, ANSWER_S):
            async with sent as response:
                limits = limits_of(given.get("max_tokens"), ANSWER_S)
                request = GenerateRequest(tuple(messages), max_tokens=given.get("max_tokens"))
                texts = read_answer(body_of(response), limits, request, answering, model, self.url)
                async with aclosing(texts):
                    async for text in texts:
                        yield text


@asynccontextmanager
async def open_backend(config: Path | None, url: str | None, api_key: str | None) -> AsyncIterator[Backend]:
    """The backend of `--config` or `--url`.

    Raises:
        ConfigError, RegistryError, RouterError: see `coe.local.open_local`.
    """
    if url is None:
        from coe.local import open_local

        assert config is not None  # checked with the flags
        async with open_local(config) as system:
            yield LocalBackend(system)
        return
    from coe.engines.remote.client import open_client

    base = url.rstrip("/") if url.rstrip("/").endswith("/v1") else f"{url.rstrip('/')}/v1"
    if not base.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is not a URL like http://127.0.0.1:8000/v1")
    try:
        opened = open_client(base, api_key or "none", timeout_s=ANSWER_S, connect_s=CONNECT_S)
    except Exception as error:  # the client's transport has errors of its own
        raise ConfigError(f"{url!r} is not a URL like http://127.0.0.1:8000/v1: {error}") from error
    async with opened as client:
        yield RemoteBackend(client, base)


@contextmanager
def _translating(url: str, wait_s: float) -> Iterator[None]:
    """Raise this project's errors for those of the client, its transport and `asyncio.timeout`."""
    from coe.engines.remote.events import MalformedStream

    try:
        yield
    except CoeError:
        raise
    except MalformedStream as error:
        raise RemoteError(f"the answer of {url} cannot be used: {error}") from error
    except Exception as error:  # the client's transport has errors of its own
        raise _translated(error, url, wait_s) from error


def _translated(error: Exception, url: str, wait_s: float) -> CoeError:
    """An error of the client in words for the person at the terminal."""
    from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

    if isinstance(error, APITimeoutError | TimeoutError):
        return RemoteError(
            f"{url} did not answer in time (connection {CONNECT_S:g} s, answer {wait_s:g} s): is it overloaded, or no "
            "HTTP server?",
            retryable=True,
        )
    if not isinstance(error, OpenAIError):
        return RemoteError(f"{url} broke off the answer ({type(error).__name__}: {error})", retryable=True)
    if isinstance(error, APIConnectionError):
        return RemoteError(f"{url} cannot be reached ({error.__cause__ or error}): is the service running?")
    if isinstance(error, APIStatusError):
        body = error.body if isinstance(error.body, dict) else {}
        hint = ", a redirect, which is not followed: give the URL that it leads to" if _redirects(error) else ""
        stated = body.get("message")
        return RemoteError(
            one_line(stated, _MOST_SHOWN)
            if stated and isinstance(stated, str)
            else f"{url} answers with HTTP {error.status_code}{hint}"
        )
    return RemoteError(f"{url}: {error}")


def _redirects(error: APIStatusError) -> bool:
    return 300 <= error.status_code < 400
