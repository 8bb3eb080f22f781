"""Graders: how an answer becomes a score. To add one, write a file beside these and a line in `GRADERS`.

Other packages add graders by entry points in the group `coe.graders`; `module:Class` names any class (docs/plugins.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from coe.evaluation.graders.base import GoldError, Grader, GraderModel, score_of
from coe.evaluation.graders.json_equality import JsonEquality
from coe.evaluation.graders.multiple_choice import MultipleChoice
from coe.evaluation.graders.number import Number
from coe.evaluation.graders.sql import SqlResult
from coe.evaluation.graders.text import Contains, Exact
from registry.plugins import Plugins

GRADERS: Final[Mapping[str, type[GraderModel]]] = {
    "exact": Exact,
    "contains": Contains,
    "number": Number,
    "choice": MultipleChoice,
    "json": JsonEquality,
    "sql": SqlResult,
}
"""What a task may name as its `grader`."""

_PLUGINS = Plugins("coe.graders", "grader", GRADERS, needs=("grade",), base=GraderModel)


def grader_class(name: str) -> type[GraderModel]:
    """The class of a grader: a built-in name, an installed entry point, or `module:Class`.

    Raises:
        PluginError: there is none, with those that exist; or it cannot be imported, or is no `GraderModel`.
    """
    found: type[GraderModel] = _PLUGINS.load(name)
    return found


__all__ = ["GRADERS", "GoldError", "Grader", "GraderModel", "grader_class", "score_of"]
