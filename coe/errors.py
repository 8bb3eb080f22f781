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
"""

from __future__ import annotations

from functools import partial
from typing import Any


class CoeError(Exception):
    """Base of every error that the system raises deliberately."""

    status: int = 500
    code: str = "internal_error"
    retryable: bool = False


class ConfigError(CoeError):
    """A configuration is wrong."""

    code = "invalid_config"


class InvalidRequest(CoeError):
    """The request cannot be served as it is."""

    status = 400
    code = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together are longer than the expert's context."""

    code = "context_length_exceeded"

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


class NotAllowed(InvalidRequest):
    """The request rules out an expert that a composition names."""

    code = "no_eligible_expert"


class UnknownModel(InvalidRequest):
    """The requested `model` does not exist."""

    status = 404
    code = "model_not_found"


class EngineError(CoeError):
    """An engine failed."""

    code = "engine_error"


class WeightsError(EngineError):
    """Weights are missing, truncated, of other shapes, or of an unsupported architecture."""

    code = "invalid_weights"


class HostLost(EngineError):
    """The host process died after the first text of an answer, which cannot be taken back."""

    status = 502
    code = "host_lost"
    retryable = True


class OutOfMemory(EngineError):
    """Not enough free memory, even after evicting what may be evicted."""

    status = 503
    code = "out_of_memory"


class Unsupported(EngineError):
    """The expert's engine cannot do what a call needs."""

    status = 501
    code = "unsupported"


class RemoteError(EngineError):
    """A remote endpoint failed."""

    status = 502
    code = "remote_error"

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(RemoteError, self.args[0], retryable=self.retryable), ()


class Abstained(CoeError):
    """The router abstained and the policy has no fallback; the message gives the reason."""

    status = 422
    code = "abstained"


class Overloaded(CoeError):
    """Too many requests are waiting."""

    status = 429
    code = "overloaded"
    retryable = True


class DeadlineExceeded(CoeError):
    """The request ran past its deadline."""

    status = 504
    code = "deadline_exceeded"
    retryable = True


class TaskError(CoeError):
    """An evaluation task is wrong; the message has file and line."""

    code = "invalid_task"
