"""Errors of the running system; third-party errors are translated into these at the seam.

CoeError                     .status: HTTP status, .code: OpenAI-style code, .retryable
├── ConfigError              a config file is wrong; says every problem and its place
├── InvalidRequest           the caller's request cannot be served as asked
│   ├── ContextLengthExceeded   prompt + answer do not fit; both numbers
│   ├── NotAllowed           the caller, or what is asked for, rules out an expert that a policy names
│   └── UnknownModel         the `model` asked for does not exist; did you mean
├── EngineError              an engine failed
│   ├── WeightsError         weights missing, truncated, of other shapes, or unsupported
│   ├── HostLost             the process that answered died, and what it had begun was shown already
│   ├── OutOfMemory          not enough free memory, even after evicting what may be evicted
│   ├── Unsupported          the expert's engine cannot do what a call needs
│   └── RemoteError          a remote endpoint failed; .retryable says whether trying again makes sense
├── Abstained                the router is unsure, and the policy refuses rather than guesses
├── Overloaded               too many requests wait; try again later
├── DeadlineExceeded         the request ran past its deadline
└── TaskError                an evaluation task is wrong; file and line
"""

from __future__ import annotations

from typing import Any


class CoeError(Exception):
    """Base of every error that the system raises on purpose."""

    status: int = 500
    code: str = "internal_error"
    retryable: bool = False


class ConfigError(CoeError):
    """A config file is wrong."""

    code = "invalid_config"


class InvalidRequest(CoeError):
    """The request cannot be served as asked."""

    status = 400
    code = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together are longer than the expert's context."""

    code = "context_length_exceeded"

    def __init__(self, expert: str, *, prompt_tokens: int, max_tokens: int, context_length: int) -> None:
        self.prompt_tokens, self.max_tokens, self.context_length = prompt_tokens, max_tokens, context_length
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and {max_tokens} are asked for, but {expert!r} has a context of "
            f"{context_length} tokens: shorten the prompt or lower max_tokens"
        )
        self.expert = expert

    def __reduce__(self) -> tuple[Any, ...]:  # errors travel between processes
        return _context_length_exceeded, (self.expert, self.prompt_tokens, self.max_tokens, self.context_length)


class NotAllowed(InvalidRequest):
    """An expert that a policy names may not take this request, or cannot."""

    code = "no_eligible_expert"


class UnknownModel(InvalidRequest):
    """The `model` asked for does not exist."""

    status = 404
    code = "model_not_found"


class EngineError(CoeError):
    """An engine failed."""

    code = "engine_error"


class WeightsError(EngineError):
    """Weights are missing, truncated, of other shapes, or of an unsupported architecture."""

    code = "invalid_weights"


class HostLost(EngineError):
    """The process that answered died after its first text, which cannot be taken back."""

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
        return _remote_error, (self.args[0], self.retryable)


class Abstained(CoeError):
    """The router abstained, and nobody was to answer in its place; the message says why."""

    status = 422
    code = "abstained"


class Overloaded(CoeError):
    """Too many requests wait already."""

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


def _context_length_exceeded(
    expert: str, prompt_tokens: int, max_tokens: int, context_length: int
) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        expert, prompt_tokens=prompt_tokens, max_tokens=max_tokens, context_length=context_length
    )


def _remote_error(message: str, retryable: bool) -> RemoteError:
    return RemoteError(message, retryable=retryable)
