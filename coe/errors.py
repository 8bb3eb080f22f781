"""Errors of the running system; third-party errors are translated into these at the seam.

CoeError                     .scope, .status: HTTP status, .code: OpenAI-style code, .retryable, .lasting, .public
├── ConfigError              a configuration is wrong; lists every problem with its place
├── InvalidRequest           the request cannot be served as it is
│   ├── Rejected             one expert cannot take the request
│   │   ├── ContextLengthExceeded   prompt + answer do not fit the context; all numbers
│   │   └── NotAllowed       the request rules out an expert that a composition names
│   └── UnknownModel         the requested `model` does not exist; with close matches
├── EngineError              an engine failed
│   ├── WeightsError         weights missing, truncated, of other shapes, or unsupported
│   ├── LoadFailing          loads of an expert failed several times in a row; it is not tried for a while
│   ├── NotServedHere        this process does not serve the expert by its catalog; others do, or will
│   ├── HostLost             the host process died after text had been streamed
│   ├── TemplateError        the expert's chat template is broken, or exceeds its limits
│   ├── OutOfMemory          not enough free memory, even after evicting what may be evicted
│   │   └── BudgetExceeded   weights can never fit the memory budget of this process
│   ├── Unsupported          the expert's engine cannot do what a call needs
│   └── RemoteError          a remote endpoint failed; .retryable: whether the same request may succeed later
├── PolicyUnavailable        the router of a policy cannot be loaded in this process
├── CompositionError         a composition raised an exception, or returned what it must not
├── RoutingFailed            a router or selector raised an exception, and the policy has no fallback that can answer
├── Abstained                the router abstained and the policy has no fallback
├── Overloaded               too many requests are waiting; try again later
├── DeadlineExceeded         the request ran past its deadline
├── InUse                    an expert cannot be unloaded now: requests use it, or it is pinned
├── ExpertDrained            the request names an expert that takes no new requests now
└── TaskError                an evaluation task is wrong; with file and line

The rule of failure. Each class has a `scope`, which determines what happens next:

    scope      meaning                                              what happens
    REQUEST    no expert can take the request                       the caller gets the error
    EXPERT     this expert cannot answer; another one may           the next expert, then the policy's fallback, each
                                                                    with a note; the error if none of them answers
    PROCESS    this process cannot answer; another one may          another process with the same expert if no text
                                                                    was sent; then as EXPERT

Whatever an expert raises has scope EXPERT or PROCESS: only what every expert rejects is the caller's fault, and then
the caller gets the rejection (400). `coe/seam.py` translates what engines and other third-party code raise. The
compositions and their fallback (`coe/compose/`) and `coe/serve/cluster/pool_client.py` read the scope, batches
(`coe/batch/answering.py`) and evaluations (`coe/evaluation/runner.py`) read `lasting`, and `coe/protocol/errors.py`
reads `status`, `code`, `retry_after_s` and the text for clients. Errors cross processes as values, so what Ray raises
is always about the process.
"""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import Any


class Scope(StrEnum):
    """What a failure is about; see the module's docstring."""

    REQUEST = "request"
    EXPERT = "expert"
    PROCESS = "process"


class CoeError(Exception):
    """Base of every error that the system raises deliberately. Subclasses inherit what they do not state.

    Attributes:
        scope: what the failure is about: the request, the expert or the process.
        status: HTTP status.
        code: OpenAI-style code.
        retryable: whether the same request may succeed later.
        lasting: whether every later call to the expert in this process fails too.
        internal: whether the message has details of the server (files, settings) that no client may read.
        public: the text for clients, where it differs from the message.
        retry_after_s: seconds after which a retry may succeed, if known.
        used_tokens: tokens read and generated that an endpoint counted for failed attempts; they are charged once.
    """

    scope: Scope = Scope.EXPERT
    status: int = 500
    code: str = "internal_error"
    retryable: bool = False
    lasting: bool = False
    internal: bool = True
    public: str | None = None
    retry_after_s: float | None = None
    used_tokens: tuple[int, int] | None = None

    def __init_subclass__(
        cls,
        *,
        scope: Scope | None = None,
        status: int | None = None,
        code: str | None = None,
        retryable: bool | None = None,
        lasting: bool | None = None,
        internal: bool | None = None,
    ) -> None:
        super().__init_subclass__()
        cls.scope, cls.status, cls.code = scope or cls.scope, status or cls.status, code or cls.code
        cls.retryable = cls.retryable if retryable is None else retryable
        cls.lasting = cls.lasting if lasting is None else lasting
        cls.internal = cls.internal if internal is None else internal

    def __init__(self, *message: object, public: str | None = None) -> None:
        super().__init__(*message)
        if public is not None:
            self.public = public

    @property
    def client_text(self) -> str | None:
        """What a client may read of the error; None if nothing."""
        return self.public or (None if self.internal else str(self))


class ConfigError(CoeError, code="invalid_config", lasting=True):
    """A configuration is wrong."""


class InvalidRequest(CoeError, scope=Scope.REQUEST, status=400, code="invalid_request", internal=False):
    """The request cannot be served as it is.

    Attributes:
        param: the field of the request, if known.
    """

    param: str | None = None


class Rejected(InvalidRequest, scope=Scope.EXPERT):
    """One expert cannot take the request: its context, chat template or endpoint rejects it.

    Args:
        message: what is wrong.
        status: other than that of the class, such as 413.
        code: other than that of the class, such as "content_filter".
        param: the field of the request, if known.
    """

    def __init__(
        self,
        *message: object,
        status: int | None = None,
        code: str | None = None,
        public: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(*message, public=public)
        if param is not None:
            self.param = param
        if status is not None:
            self.status = status
        if code is not None:
            self.code = code


class ContextLengthExceeded(Rejected, code="context_length_exceeded"):
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


class NotAllowed(Rejected, code="no_eligible_expert"):
    """The request rules out an expert that a composition names."""


class UnknownModel(InvalidRequest, scope=Scope.EXPERT, status=404, code="model_not_found", lasting=True):
    """The requested `model`, or a chosen expert, does not exist."""


class EngineError(CoeError, code="engine_error", internal=False):
    """An engine failed."""


class WeightsError(EngineError, code="invalid_weights", lasting=True, internal=True):
    """Weights are missing, truncated, of other shapes, or of an unsupported architecture."""


class LoadFailing(EngineError, scope=Scope.PROCESS, status=503, code="load_failing", retryable=True, internal=True):
    """Loads of an expert failed several times in a row in this process, which does not try again for a while.

    Args:
        message: with the last error, for operators.
        retry_after_s: seconds until it does.
        public: the text for clients.
        last: the error of the last load, if it is one of these classes.
    """

    last: CoeError | None = None

    def __init__(
        self,
        *message: object,
        retry_after_s: float | None = None,
        public: str | None = None,
        last: CoeError | None = None,
    ) -> None:
        super().__init__(*message, public=public)
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s
        self.last = last


def without_refusal(error: CoeError) -> CoeError:
    """The error itself; for an expert that is not tried for a while, the error of its last load."""
    return error.last if isinstance(error, LoadFailing) and error.last is not None else error


class NotServedHere(EngineError, scope=Scope.PROCESS, status=503, code="expert_moved", retryable=True):
    """This process does not serve the expert, and its catalog is another one than that of the request.

    Args:
        message: what happened.
        generation: of the catalog of this process.
        pools: names of the pools that serve the expert by that catalog, if it is newer than that of the request.
    """

    def __init__(
        self, *message: object, generation: int = 0, pools: tuple[str, ...] = (), public: str | None = None
    ) -> None:
        super().__init__(*message, public=public)
        self.generation, self.pools = generation, pools


class HostLost(EngineError, scope=Scope.PROCESS, status=502, code="host_lost", retryable=True):
    """The host process died after the first text of an answer, which cannot be taken back."""


class TemplateError(EngineError, code="invalid_template"):
    """The chat template of an expert is broken, or exceeds the limits of rendering."""


class OutOfMemory(EngineError, status=503, code="out_of_memory", lasting=True):
    """Not enough free memory, even after evicting what may be evicted."""


class BudgetExceeded(OutOfMemory, scope=Scope.PROCESS):
    """Weights can never fit the memory budget of this process; that of another pool may be larger."""


class Unsupported(EngineError, status=501, code="unsupported"):
    """The expert's engine cannot do what a call needs."""


class RemoteError(EngineError, status=502, code="remote_error"):
    """A remote endpoint failed.

    Args:
        message: what happened, for operators.
        retryable: whether the same request may succeed later.
        status: other than 502: 429 and 503 of an endpoint are passed on.
        retry_after_s: seconds that the endpoint stated.
        public: the text for clients.
    """

    def __init__(
        self,
        *message: object,
        retryable: bool = False,
        status: int | None = None,
        retry_after_s: float | None = None,
        public: str | None = None,
    ) -> None:
        super().__init__(*message, public=public)
        self.retryable = retryable
        if status is not None:
            self.status = status
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class PolicyUnavailable(CoeError, scope=Scope.PROCESS, status=503, code="policy_unavailable", retryable=True):
    """The router of a policy cannot be loaded in this process, for the reason in the message."""

    def __init__(self, policy: str, reason: str) -> None:
        super().__init__(f"policy {policy!r} is unavailable: {reason}")
        self.policy, self.reason = policy, reason
        self.public = f"policy {policy!r} is unavailable, because its router cannot be loaded"

    def __reduce__(self) -> tuple[Any, ...]:
        return PolicyUnavailable, (self.policy, self.reason)


class CompositionError(CoeError, code="composition_failed"):
    """A composition raised an exception of its own, or broke the contract of `step`."""


class RoutingFailed(CoeError, code="router_error"):
    """A router or selector raised an exception of its own, and the policy has no fallback that can answer."""


class Abstained(CoeError, status=422, code="abstained", internal=False):
    """The router abstained and the policy has no fallback; the message gives the reason."""


class Overloaded(CoeError, scope=Scope.PROCESS, status=429, code="overloaded", retryable=True, internal=False):
    """Too many requests are waiting."""


class DeadlineExceeded(CoeError, status=504, code="deadline_exceeded", retryable=True, internal=False):
    """The request ran past its deadline."""


class InUse(CoeError, scope=Scope.REQUEST, status=409, code="in_use", retryable=True, internal=False):
    """An expert cannot be unloaded now: requests use it, or it is pinned."""


class ExpertDrained(CoeError, scope=Scope.REQUEST, status=503, code="expert_drained", retryable=True, internal=False):
    """The request names an expert that takes no new requests, for the reason that an operator stated."""

    def __init__(self, expert: str, reason: str) -> None:
        super().__init__(f"{expert!r} takes no new requests now" + (f": {reason}" if reason else ""))
        self.expert, self.reason = expert, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return ExpertDrained, (self.expert, self.reason)


class TaskError(CoeError, code="invalid_task"):
    """An evaluation task is wrong; the message has file and line."""
