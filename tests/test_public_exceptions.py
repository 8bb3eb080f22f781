"""Public exceptions cross process borders: pickle and deepcopy keep class, text and attributes."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "UnknownExpert": (("sqll", ["sql", "law"]), {"where": "the catalog"}),
    "DiskFull": ((Path("folder/file"),), {"free_bytes": 1_000_000, "needed_bytes": 2_000_000}),
    "InvalidOutcomes": (("one problem", "another"), {"source": "scores.csv"}),
    "NoEligibleExpert": (("no expert is left",), {"constraints": ["json"]}),
    "ContextLengthExceeded": (("sql",), {"prompt_tokens": 3, "max_tokens": 4, "context_length": 5}),
    "PolicyUnavailable": (("default", "its folder is gone"), {}),
    "ExpertDrained": (("sql", "new GPU"), {}),
    "RemoteError": (("it failed",), {"retryable": True}),
}


def exceptions() -> Iterator[type[Exception]]:
    for package in map(import_module, ("registry", "routers", "coe")):
        for name in package.__all__:
            value = getattr(package, name)
            if inspect.isclass(value) and issubclass(value, Exception):
                yield value


def instance(kind: type[Exception]) -> Exception:
    if kind.__name__ == "InvalidSpec":
        from registry import Problem

        return kind([Problem("experts.yaml", "is wrong", 12, "experts[3].base"), Problem("b.yaml", "is missing")])
    arguments, named = ARGUMENTS.get(kind.__name__, (("what is wrong",), {}))
    return kind(*arguments, **named)


@pytest.mark.parametrize("kind", list(exceptions()), ids=lambda kind: kind.__name__)
def test_a_public_exception_survives_a_copy(kind: type[Exception]) -> None:
    error = instance(kind)
    assert str(error)
    for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error), copy.copy(error)):
        assert type(again) is kind and str(again) == str(error)
        assert vars(again) == vars(error)
