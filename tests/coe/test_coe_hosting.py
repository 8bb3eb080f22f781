"""Opening a host for a configuration: what its log reports."""

from __future__ import annotations

import pytest

from coe.config import Config
from coe.hosting import open_host
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "expert 'e00' cannot be loaded here, and requests for it are refused: 'e00@1' need 2 MiB"),
        (12, "'e09' and 2 more. The first: 'e00@1' need 2 MiB, the budget is 1 MiB"),
    ],
)
async def test_experts_that_are_too_large_are_one_line_of_the_log(
    caplog: pytest.LogCaptureFixture, count: int, words: str
) -> None:
    names = [f"e{n:02}" for n in range(count)]
    specs = {
        name: ExpertSpec(name=name, kind=Kind.MODEL, source="fake://echo", size_bytes=2**21, version=1)
        for name in names
    }
    config = Config.model_validate({"host": {"budget": 2**20}})
    with caplog.at_level("WARNING", "coe.hosting"):
        async with open_host(config, Snapshot(1, specs)):
            pass
    [line] = [record.getMessage() for record in caplog.records if record.name == "coe.hosting"]
    assert words in line
