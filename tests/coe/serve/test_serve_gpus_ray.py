"""Hosts get the GPUs that they ask for from Ray, which counts declared ones: the machine needs none.

One service for these tests, since most of their time is its start; the last of them ends it with SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import parallel_engine
import pytest
from serve_process import STOP_S, ServeProcess, starting, until

pytestmark = pytest.mark.integration

EXPERTS = """
experts:
  - {name: echo, kind: model, source: "fake://echo", size_bytes: 1000}
  - {name: upper, kind: model, source: "fake://upper", size_bytes: 1000}
  - {name: large, kind: model, source: "large://x", engine: "parallel_engine:ParallelEngine", size_bytes: 1000}
"""
CONFIG = """
experts: [experts.yaml]
engines:
  fake: {{slots: 1, slot_bytes: 1000, token_delay_s: 0.05}}
  "parallel_engine:ParallelEngine": {{tensor_parallel_size: 2}}
policies: {{default: {{expert: echo}}}}
serve:
  gateway: {{num_cpus: 0.1}}
  pools:
    - {{name: half, num_gpus: {half}, replicas: 2, experts: [echo, upper], budget: 2000, num_cpus: 0.1}}
    - {{name: whole, num_gpus: 1, experts: [echo], budget: 2000, num_cpus: 0.1}}
    - {{name: split, experts: [large], budget: 2000, num_cpus: 0.1}}
  log: {{folder: null}}
"""
N_GPUS = 4
"""All are asked for: two halves of one, a whole one, and the two that share a model."""


def environment() -> dict[str, str]:
    """Ray counts these GPUs, and its processes find the engine of the tests."""
    support = str(Path(parallel_engine.__file__).parent)
    paths = [support, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"RAY_OVERRIDE_RESOURCES": json.dumps({"GPU": N_GPUS}), "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("service")
    with starting(folder, CONFIG.format(half=0.5), EXPERTS, **environment()) as service:
        service.wait_for("Ctrl-C  stops")
        yield service


def ask(service: ServeProcess, model: str, text: str) -> str:
    with openai.OpenAI(base_url=service.base_url, api_key="none") as client:
        answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}])
    return answer.choices[0].message.content or ""


def test_a_service_that_asks_for_more_gpus_than_ray_has_ends_with_the_reason(tmp_path: Path) -> None:
    """The first of these tests: nothing else runs yet."""
    with starting(tmp_path, CONFIG.format(half=3), EXPERTS, **environment()) as refused:
        assert refused.process.wait(100) != 0
        assert "2 processes of the pool 'half' ask for 3 GPUs each, and Ray has 4" in " ".join(refused.screen.split())


def test_hosts_share_the_gpus_that_ray_counts(service: ServeProcess) -> None:
    gpus = sorted((host["pool"], *host["gpus"]) for host in service.hosts() if host["pool"] != "split")
    [shared] = {gpu for pool, gpu in gpus if pool == "half"}
    [whole] = [gpu for pool, gpu in gpus if pool == "whole"]
    assert len(gpus) == 3 and len({shared, whole}) == 2 and {shared, whole} <= {str(i) for i in range(N_GPUS)}
    for model, answer in (("echo", "hi"), ("upper", "HI"), ("echo", "hi")):
        assert ask(service, model, "hi") == answer
    assert all(host["used_bytes"] <= 2000 for host in service.hosts())


def test_a_model_gets_its_gpus_from_ray_again_after_its_host_was_killed(service: ServeProcess) -> None:
    """No other is free: a host that left one behind would keep its replacement waiting."""
    others = {gpu for host in service.hosts() if host["pool"] != "split" for gpu in host["gpus"]}
    rest = sorted({str(i) for i in range(N_GPUS)} - others)
    assert len(rest) == 2
    assert sorted(ask(service, "large", "hi").split()) == rest
    [host] = service.parts("ray::ServeReplica:coe:split")
    os.kill(host, signal.SIGKILL)
    assert sorted(ask(service, "large", "hi").split()) == rest


def test_a_host_runs_on_when_its_last_model_on_several_gpus_leaves_its_pool_and_when_it_returns(
    service: ServeProcess,
) -> None:
    [host] = service.parts("ray::ServeReplica:coe:split")
    gpus = ask(service, "large", "hi")
    changed = "other experts in the pools split"
    with_large = CONFIG.format(half=0.5)
    (service.folder / "service.yaml").write_text(with_large.replace("[large]", "[upper]"))
    service.wait_for(changed)
    assert ask(service, "upper", "hi") == "HI"
    (service.folder / "service.yaml").write_text(with_large)
    service.wait_for(changed, times=2)
    assert ask(service, "large", "hi") == gpus
    assert service.parts("ray::ServeReplica:coe:split") == [host] and "restarts" not in service.screen


def test_sigterm_ends_a_service_as_ctrl_c_does(service: ServeProcess) -> None:
    """The last of these tests. A service manager sends it to the command alone; Ray's core would treat it as a crash.

    Requests run whose answers take longer than all grace: their connections end, and no process is left.
    """
    with ThreadPoolExecutor(40) as clients:
        body = {"model": "echo", "prompt": "word " * 2000, "max_tokens": 2000}
        answers = [
            clients.submit(_posted, f"{service.base_url}/completions", body | {"stream": i % 2 == 0}) for i in range(40)
        ]
        until(lambda: sum(host["busy"] for host in service.hosts()) > 0, 20)
        time.sleep(1)
        service.process.terminate()
        assert service.ended(3 * STOP_S) == 0  # the machine may run other tests
        assert service.screen.rstrip().endswith("stopped") and "SIGTERM" not in service.screen
        for answer in answers:
            assert b"[DONE]" not in answer.result(5)


def _posted(url: str, body: dict[str, Any]) -> bytes:
    """What comes of an answer until its connection ends."""
    request = Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urlopen(request, timeout=60) as response:
            return bytes(response.read())
    except HTTPError as error:
        return bytes(error.read())
    except (OSError, HTTPException):
        return b""
