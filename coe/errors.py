"""Errors of the running system; third-party errors are translated into these at the seam.

CoeError                     .status: HTTP status, .code: OpenAI-style code, .retryable
├── ConfigError              a configuration is wrong; lists every problem with its place
├── InvalidRequest           the request cannot be served as it is
│   ├── ContextLengthExceeded   prompt + answer do not fit the context; all numbers
│   ├── NotAllowed           the request rules out an expert that a composition names
│   └── UnknownModel         the requested `model` does not exist; with close matches
├── EngineError              an engine failed
│   ├── WeightsError         weights missing, truncated, of other shapes, or unsupported
│   ├── HostLost             the host process died after text had been streamed
│   ├── OutOfMemory          not enough free memory, even after evicting what may be evicted
│   ├── Unsupported          the expert's engine cannot do what a call needs
│   └── RemoteError          a remote endpoint failed; .retryable: whether the same request may succeed later
├── Abstained                the router abstained and the policy has no fallback
├── Overloaded               too many requests are waiting; try again later
├── DeadlineExceeded         the request ran past its deadline
└── TaskError                an evaluation task is wrong; with file and line

Each kind of failure is handled in one place: failed experts in `Composition.step` (the decision's next expert, then the
policy's fallback), wrong requests nowhere (InvalidRequest is never retried on another expert), lost host processes in
`coe/serve/cluster/pool_client.py`. Errors cross processes as values, so what Ray raises is always about the process.
"""

from __future__ import annotations

from functools import partial
from typing import Any


class CoeError(Exception):
    """Base of every error that the system raises deliberately. Subclasses inherit what they do not state.

    Attributes:
        status: HTTP status.
        code: OpenAI-style code.
        retryable: whether the same request may succeed later.
    """

    status: int = 500
    code: str = "internal_error"
    retryable: bool = False

    def __init_subclass__(
        cls, *, status: int | None = None, code: str | None = None, retryable: bool | None = None
    ) -> None:
        super().__init_subclass__()
        cls.status, cls.code = status or cls.status, code or cls.code
        cls.retryable = cls.retryable if retryable is None else retryable


class ConfigError(CoeError, code="invalid_config"):
    """A configuration is wrong."""


class InvalidRequest(CoeError, status=400, code="invalid_request"):
    """The request cannot be served as it is."""


class ContextLengthExceeded(InvalidRequest, code="context_length_exceeded"):
    """Prompt and answer together are longer than the expert's context."""

    def __init__(self, expert: str, *, prompt_tokens: int, max_tokens: int, context_length: int) -> None:
        self.prompt_tokens, self.max_tokens, self.context_length = prompt_tokens, max_tokens, context_length
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, but {expert!r} has a context of "
            f"{context_length} tokens: shorten the prompt or lower max_tokens"
        )
        self.expert = expert

    def __reduce__(self) -> tuple[Any, ...]:  # errors travel between processes
        numbers = {name: getattr(self, name) for name in ("prompt_tokens", "max_tokens", "context_length")}
        return partial(ContextLengthExceeded, self.expert, **numbers), ()


class NotAllowed(InvalidRequest, code="no_eligible_expert"):
    """The request rules out an expert that a composition names."""


class UnknownModel(InvalidRequest, status=404, code="model_not_found"):
    """The requested `model` does not exist."""


class EngineError(CoeError, code="engine_error"):
    """An engine failed."""


class WeightsError(EngineError, code="invalid_weights"):
    """Weights are missing, truncated, of other shapes, or of an unsupported architecture."""


class HostLost(EngineError, status=502, code="host_lost", retryable=True):
    """The host process died after the first text of an answer, which cannot be taken back."""


class OutOfMemory(EngineError, status=503, code="out_of_memory"):
    """Not enough free memory, even after evicting what may be evicted."""


class Unsupported(EngineError, status=501, code="unsupported"):
    """The expert's engine cannot do what a call needs."""


class RemoteError(EngineError, status=502, code="remote_error"):
    """A remote endpoint failed."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(RemoteError, self.args[0], retryable=self.retryable), ()


class Abstained(CoeError, status=422, code="abstained"):
    """The router abstained and the policy has no fallback; the message gives the reason."""


class Overloaded(CoeError, status=429, code="overloaded", retryable=True):
    """Too many requests are waiting."""


class DeadlineExceeded(CoeError, status=504, code="deadline_exceeded", retryable=True):
    """The request ran past its deadline."""


class TaskError(CoeError, code="invalid_task"):
    """An evaluation task is wrong; the message has file and line."""
