"""A Ray of one's own: a start that fails is cleared up and tried once more."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from coe.errors import ConfigError
from coe.own_ray import ATTEMPTS, start_ray


class Starts:
    """Stands for `ray.init`: the first starts leave a process and fail."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.options: list[dict[str, Any]] = []
        self.left: list[subprocess.Popen[bytes]] = []

    def __call__(self, **options: Any) -> None:
        self.options.append(options)
        if len(self.options) <= self.failures:
            self.left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
            raise Exception("The current node timed out during startup.")  # as Ray's


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Starts:
    made = Starts(request.param)
    monkeypatch.setattr("ray.init", made)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    return made


@pytest.mark.parametrize("starts", [0, 1], indirect=True)
def test_ray_starts_also_if_its_first_start_fails(starts: Starts) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        start_ray(num_cpus=3)
        assert other.poll() is None  # a process that was there before
        other.communicate(b"end\n", 30)
    assert len(starts.options) == starts.failures + 1
    assert all(each["num_cpus"] == 3 and each["address"] == "local" for each in starts.options)
    assert all(each.poll() is not None for each in starts.left)


@pytest.mark.parametrize("starts", [9], indirect=True)
def test_a_ray_that_does_not_start_is_one_error(starts: Starts) -> None:
    with pytest.raises(ConfigError, match="Ray cannot be started on this machine: The current node timed out"):
        start_ray()
    assert len(starts.options) == ATTEMPTS
    assert all(each.poll() is not None for each in starts.left)
