"""OpenAI's errors: every class of the error trees has an explicit status, type and code."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

import coe.errors
import registry.errors
import routers.errors
from coe.protocol.errors import FieldProblem, InvalidFields, RequestTooLarge, error_body, is_internal, retry_after_s

BAD, RATE, SERVER = "invalid_request_error", "rate_limit_error", "server_error"
TOLD = {
    coe.errors.CoeError("x"): (500, SERVER, "internal_error", "hidden"),
    coe.errors.ConfigError("x"): (500, SERVER, "invalid_config", "hidden"),
    coe.errors.InvalidRequest("x"): (400, BAD, "invalid_request", "told"),
    coe.errors.ContextLengthExceeded("e", prompt_tokens=9, max_tokens=5, context_length=10): (
        400,
        BAD,
        "context_length_exceeded",
        "told",
    ),
    coe.errors.InUse("x"): (409, BAD, "in_use", "told"),
    coe.errors.Rejected("x"): (400, BAD, "invalid_request", "told"),
    coe.errors.CompositionError("x"): (500, SERVER, "composition_failed", "hidden"),
    coe.errors.RoutingFailed("x"): (500, SERVER, "router_error", "hidden"),
    coe.errors.PolicyUnavailable("p", "x"): (503, SERVER, "policy_unavailable", "public"),
    coe.errors.NotAllowed("x"): (400, BAD, "no_eligible_expert", "told"),
    coe.errors.UnknownModel("x"): (404, BAD, "model_not_found", "told"),
    coe.errors.EngineError("x"): (500, SERVER, "engine_error", "told"),
    coe.errors.WeightsError("x"): (500, SERVER, "invalid_weights", "hidden"),
    coe.errors.TemplateError("x"): (500, SERVER, "invalid_template", "told"),
    coe.errors.OutOfMemory("x"): (503, SERVER, "out_of_memory", "told"),
    coe.errors.BudgetExceeded("x"): (503, SERVER, "out_of_memory", "told"),
    coe.errors.Unsupported("x"): (501, SERVER, "unsupported", "told"),
    coe.errors.LoadFailing("x"): (503, SERVER, "load_failing", "hidden"),
    coe.errors.ExpertDrained("x", "y"): (503, SERVER, "expert_drained", "told"),
    coe.errors.NotServedHere("x"): (503, SERVER, "expert_moved", "told"),
    coe.errors.HostLost("x"): (502, SERVER, "host_lost", "told"),
    coe.errors.RemoteError("x"): (502, SERVER, "remote_error", "told"),
    coe.errors.Abstained("x"): (422, BAD, "abstained", "told"),
    coe.errors.Overloaded("x"): (429, RATE, "overloaded", "told"),
    coe.errors.DeadlineExceeded("x"): (504, SERVER, "deadline_exceeded", "told"),
    coe.errors.TaskError("x"): (500, SERVER, "invalid_task", "hidden"),
    InvalidFields(FieldProblem("n", "unsupported_parameter", "x")): (400, BAD, "unsupported_parameter", "told"),
    RequestTooLarge("x"): (413, BAD, "request_too_large", "told"),
    routers.errors.RouterError("x"): (500, SERVER, "router_error", "hidden"),
    routers.errors.InvalidOutcomes("x"): (500, SERVER, "router_error", "hidden"),
    routers.errors.InvalidEncoder("x"): (500, SERVER, "router_error", "hidden"),
    routers.errors.InvalidArtifact("x"): (500, SERVER, "router_error", "hidden"),
    routers.errors.InvalidSettings("x"): (500, SERVER, "router_error", "hidden"),
    routers.errors.UnknownRouterKind("x"): (500, SERVER, "router_error", "hidden"),
    routers.errors.NoEligibleExpert("x"): (400, BAD, "no_eligible_expert", "told"),
    registry.errors.RegistryError("x"): (500, SERVER, "registry_error", "hidden"),
    registry.errors.InvalidSpec([registry.errors.Problem("p", "x")]): (500, SERVER, "registry_error", "hidden"),
    registry.errors.UnknownExpert("x", []): (404, BAD, "model_not_found", "told"),
    registry.errors.SourceError("x"): (500, SERVER, "registry_error", "hidden"),
    registry.errors.DigestMismatch("x"): (500, SERVER, "registry_error", "hidden"),
    registry.errors.StoreError("x"): (500, SERVER, "registry_error", "hidden"),
    registry.errors.StaleChange("x"): (500, SERVER, "registry_error", "hidden"),
    registry.errors.TargetError("x"): (500, SERVER, "registry_error", "hidden"),
    registry.errors.DiskFull(Path("x")): (500, SERVER, "registry_error", "hidden"),
    registry.errors.PluginError("x"): (500, SERVER, "registry_error", "hidden"),
    registry.errors.UnknownPlugin("x"): (500, SERVER, "registry_error", "hidden"),
    ValueError("x"): (500, SERVER, "internal_error", "hidden"),
}


def tree(base: type[Exception], module: str) -> Iterator[type[Exception]]:
    yield base
    for child in base.__subclasses__():
        if child.__module__ == module:
            yield from tree(child, module)


@pytest.mark.parametrize(("error", "told"), TOLD.items(), ids=lambda value: type(value).__name__)
def test_each_error_has_its_status_type_and_code(error: Exception, told: tuple[int, str, str, str]) -> None:
    status, kind, code, message = told
    got, body = error_body(error, logged_as="4711")
    assert (got, body["error"]["type"], body["error"]["code"]) == (status, kind, code)
    assert body["error"].keys() == {"message", "type", "param", "code"}
    context = "This model's maximum context length is exceeded: " if code == "context_length_exceeded" else ""
    if message == "told":
        shown = context + str(error)
        if isinstance(error, coe.errors.UnknownModel | registry.errors.UnknownExpert):
            shown += "; GET /v1/models lists all"  # a client has no `coe` command
        assert body["error"]["message"] == shown and not is_internal(error)
    elif message == "public":
        assert body["error"]["message"].startswith(f"{error.public}; details are logged under") and is_internal(error)  # type: ignore[attr-defined]
    else:
        assert body["error"]["message"].endswith("logged under the id 4711") and is_internal(error)
    assert error_body(error)[1]["error"]["message"] == context + str(error), (
        "without a log to look into, the cause itself"
    )


def test_no_class_of_the_error_trees_is_left_out() -> None:
    classes = {
        *tree(coe.errors.CoeError, "coe.errors"),
        *tree(coe.errors.InvalidRequest, "coe.protocol.errors"),
        *tree(routers.errors.RouterError, "routers.errors"),
        *tree(registry.errors.RegistryError, "registry.errors"),
    }
    assert classes <= {type(error) for error in TOLD}


def test_the_field_at_fault_is_named_and_survives_the_way_between_processes() -> None:
    error = InvalidFields(FieldProblem("n", "unsupported_parameter", "no"), FieldProblem("stop", "x", "no"))
    for same in (error, pickle.loads(pickle.dumps(error))):
        assert error_body(same)[1] == {
            "error": {
                "message": "2 problems:\nn: no\nstop: no",
                "type": BAD,
                "param": "n",
                "code": "unsupported_parameter",
            }
        }


def test_a_prompt_that_no_experts_context_takes_is_told_as_that() -> None:
    error = routers.errors.NoEligibleExpert("nobody", constraints=["json", "context length"])
    assert error_body(error)[1]["error"]["code"] == "context_length_exceeded"
    error = routers.errors.NoEligibleExpert("nobody", constraints=["json"])
    assert error_body(pickle.loads(pickle.dumps(error)))[1]["error"]["code"] == "no_eligible_expert"


@pytest.mark.parametrize(
    "error",
    [
        coe.errors.ContextLengthExceeded("e", prompt_tokens=9, max_tokens=5, context_length=10),
        coe.errors.Rejected("413 of the endpoint", code="context_length_exceeded", public="its context is too short"),
        routers.errors.NoEligibleExpert("no expert can take this query", constraints=["context length"]),
    ],
)
@pytest.mark.parametrize("logged_as", ["77", None])
def test_clients_recognise_each_context_error_by_openais_words(error: Exception, logged_as: str | None) -> None:
    message = error_body(error, logged_as=logged_as)[1]["error"]["message"]
    assert message.startswith("This model's maximum context length is exceeded: ")
    assert "maximum context length" not in error_body(coe.errors.InvalidRequest("x"))[1]["error"]["message"]
    stated = coe.errors.Rejected("This model's maximum context length is 5 tokens", code="context_length_exceeded")
    assert error_body(stated)[1]["error"]["message"] == "This model's maximum context length is 5 tokens"


def test_an_error_without_words_is_told_by_its_name() -> None:
    assert error_body(KeyError())[1]["error"]["message"] == "KeyError"


def test_when_to_come_back() -> None:
    later = coe.errors.Overloaded("full")
    later.retry_after_s = 2.2  # type: ignore[attr-defined]
    assert retry_after_s(later) == 3
    assert retry_after_s(coe.errors.Overloaded("full")) == retry_after_s(coe.errors.OutOfMemory("full")) == 1
    assert retry_after_s(coe.errors.EngineError("x")) is retry_after_s(ValueError("x")) is None
