"""The visible list of engines."""

from __future__ import annotations

from coe.engines import ENGINES, create_engine


def test_every_listed_engine_can_be_created() -> None:
    assert {kind: type(create_engine(kind)).__name__ for kind in ENGINES} == {
        "fake": "FakeEngine",
        "hf": "HFEngine",
        "remote": "RemoteEngine",
    }
