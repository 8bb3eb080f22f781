"""`coe drain | undrain | pin | unpin`: what is sent to the service, and what its answer means."""

import json

import pytest
from test_cli_weights import Endpoint, assert_fails, endpoint, run

from coe.errors import RemoteError

__all__ = ["endpoint"]


def test_drain_says_what_is_left_and_undrain_undoes_it(endpoint: Endpoint) -> None:
    endpoint.answer = 200, {"object": "coe.drain", "drained": True, "requests": 0}
    done = run("drain", "sql", "legal", "--reason", "new GPU", "--wait", "5", "--url", endpoint.url)
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (0, "drained sql, legal")
    endpoint.answer = 200, {"object": "coe.drain", "drained": True, "requests": 2}
    left = run("drain", "sql", "--wait", "0", "--url", endpoint.url, "--api-key-env", "KEY", "--json", "-")
    assert left.exit_code == 1 and "requests in progress: 2" in left.stderr and json.loads(left.stdout)["requests"] == 2
    endpoint.answer = 200, {"object": "coe.drain", "drained": False, "requests": 0}
    assert "takes requests again" in run("undrain", "sql", "--url", endpoint.url).stderr
    assert endpoint.asked == [
        ("POST", "/admin/drain?expert=sql&expert=legal&reason=new+GPU&wait_s=5", None),
        ("POST", "/admin/drain?expert=sql&reason=&wait_s=0", "Bearer hunter22"),
        ("POST", "/admin/undrain?expert=sql", None),
    ]


@pytest.mark.parametrize("command", ["pin", "unpin"])
def test_pins_are_stated_and_errors_are_the_words_of_the_service(endpoint: Endpoint, command: str) -> None:
    endpoint.answer = 200, {"object": "coe.pin", "served": True}
    assert run(command, "sql", "--url", endpoint.url).stderr.splitlines()[-1] == f"{command}ned sql"
    endpoint.answer = 200, {"object": "coe.pin", "served": False}
    assert "not every gateway has taken that yet" in run(command, "sql", "--url", endpoint.url).stderr
    assert endpoint.asked[0] == ("POST", f"/admin/{command}?expert=sql", None)
    endpoint.answer = 409, {"error": {"message": "the configuration pins sql"}}
    assert_fails(RemoteError, "the configuration pins sql", command, "sql", "--url", endpoint.url)
    endpoint.answer = 200, {"hosts": []}
    assert_fails(RemoteError, "is it a service of `coe serve`", command, "sql", "--url", endpoint.url)
