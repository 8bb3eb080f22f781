"""What vLLM raises for a request, as our errors."""

from __future__ import annotations

from coe.engines.supervision.core import EngineLost
from coe.errors import CoeError, EngineError, HostLost, Overloaded, Rejected
from coe.seam import text_of
from registry.spec import ExpertSpec


def request_error(name: str, error: Exception) -> CoeError:
    """The error of one request; the engine goes on.

    Args:
        name: of the expert.
        error: of vLLM, or of what it calls.
    """
    from vllm.exceptions import GracefulHTTPError, VLLMClientError

    if isinstance(error, CoeError):
        return error
    cause = error.__cause__ if error.__cause__ is not None else error
    if isinstance(error, VLLMClientError | ValueError):
        return Rejected(f"{name!r} cannot take the request: {_message(error)}")
    if isinstance(error, GracefulHTTPError):
        return Overloaded(f"{name!r} accepts no more requests now: {_message(error)}")
    return EngineError(
        f"{name!r} failed while generating: {type(cause).__name__}: {text_of(cause)}", public=f"{name!r} failed"
    )


def is_dead(error: BaseException) -> bool:
    """Whether the engine process is gone."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError) or isinstance(error.__cause__, EngineDeadError)


def died_after_loading(spec: ExpertSpec) -> EngineError:
    """The error of a load whose engine process ends as soon as it computes."""
    kernels = f"kernels for {spec.quantization}" if spec.quantization else "kernels"
    return EngineError(
        f"{spec.name!r} cannot be served: its vLLM process died while it answered a fixed prompt after loading; it "
        f"wrote the reason to stderr, such as {kernels} that this build of vLLM lacks",
        public=f"expert {spec.name!r} cannot be loaded",
    )


def lost(name: str, *, shown: bool) -> EngineError:
    """The error of a request whose engine process died twice, or after its first text."""
    if shown:
        return HostLost(f"the engine process that answered with {name!r} died; retry the request")
    return EngineLost(f"the engine process of {name!r} died twice while it worked on this request")


def _message(error: Exception) -> str:
    """The message without the rejected value, which vLLM appends."""
    return str(error.args[0]) if error.args else text_of(error)
