"""Where the answers of a conversation come from: experts in this process, or a running service."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from coe.errors import CoeError, ConfigError, RemoteError
from coe.types import GenerateRequest
from routers.base import Message

CONNECT_S = 10.0
"""Seconds to connect to an endpoint."""
LIST_S = 60.0
"""Seconds to wait for an endpoint's list of models."""
ANSWER_S = 600.0
"""Seconds to wait for the next bytes of an answer; a cold expert loads before its first one."""

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from coe.local import System


@dataclass(slots=True)
class Answering:
    """One answer while it comes.

    Attributes:
        expert: who answers, from the first text on. text: what came so far.
        why: the decision and the estimate that it was made from, as `coe.protocol.responses.route_body` has them,
            with `asked` (the experts that were called), `notes`, `cost_usd` and `tokens`; empty before the end.
    """

    expert: str | None = None
    text: str = ""
    why: dict[str, Any] = field(default_factory=dict)


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
    """A running service, or any OpenAI-compatible endpoint (which does not tell why)."""

    client: AsyncOpenAI
    url: str

    async def models(self) -> Sequence[str]:
        """What GET /v1/models lists. Raises RemoteError."""
        from openai import Timeout

        try:
            page = await self.client.models.list(timeout=Timeout(LIST_S, connect=CONNECT_S))
            return [str(model.id) for model in page.data]
        except _OTHER_FORMAT as error:
            raise RemoteError(
                f"{self.url}/models does not return a list of models: is the URL that of an OpenAI-compatible endpoint?"
            ) from error
        except Exception as error:  # the client's transport has errors of its own
            raise _translated(error, self.url, LIST_S) from error

    async def answer(
        self, messages: Sequence[Message], model: str, settings: Mapping[str, Any], answering: Answering
    ) -> AsyncGenerator[str, None]:
        """See `Backend`."""
        conversation: Any = [{"role": message.role, "content": message.content} for message in messages]
        given = {name: value for name, value in settings.items() if value is not None}
        try:
            stream = await self.client.chat.completions.create(
                model=model,
                messages=conversation,
                stream=True,
                stream_options={"include_usage": True},
                extra_headers={"x-coe-debug": "true"},
                **given,
            )
            async with stream:
                async for chunk in stream:
                    answering.expert = chunk.model or model
                    answering.why |= (chunk.model_extra or {}).get("coe") or {}
                    if chunk.usage is not None:
                        answering.why["tokens"] = chunk.usage.completion_tokens
                    text = chunk.choices[0].delta.content if chunk.choices else None
                    answering.text += text or ""
                    yield text or ""
        except _OTHER_FORMAT as error:
            raise RemoteError(f"{self.url} sends a stream that is not in the format of OpenAI: {error}") from error
        except Exception as error:  # the client's transport has errors of its own
            raise _translated(error, self.url, ANSWER_S) from error
        if answering.expert is None:
            raise RemoteError(f"{self.url} ended the answer without a chunk: does the endpoint support streaming?")


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
    from openai import AsyncOpenAI, Timeout

    base = url.rstrip("/") if url.rstrip("/").endswith("/v1") else f"{url.rstrip('/')}/v1"
    if not base.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is not a URL like http://127.0.0.1:8000/v1")
    try:
        timeout = Timeout(ANSWER_S, connect=CONNECT_S)
        opened = AsyncOpenAI(base_url=base, api_key=api_key or "none", max_retries=0, timeout=timeout)
    except Exception as error:  # the client's transport has errors of its own
        raise ConfigError(f"{url!r} is not a URL like http://127.0.0.1:8000/v1: {error}") from error
    async with opened as client:
        yield RemoteBackend(client, base)


_OTHER_FORMAT = (AttributeError, LookupError, TypeError, ValueError)
"""What reading a body of another format raises in the client."""


def _translated(error: Exception, url: str, wait_s: float) -> CoeError:
    """An error of the client in words for the person at the terminal."""
    from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

    if isinstance(error, APITimeoutError):
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
        return RemoteError(str(body.get("message") or f"{url} answers with HTTP {error.status_code}"))
    return RemoteError(f"{url}: {error}")
