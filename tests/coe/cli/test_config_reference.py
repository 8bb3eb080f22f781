"""docs/configuration.md matches the code and describes every key."""

from pathlib import Path

import pytest

from coe.cli.config.reference import describe_names, reference
from coe.config import Config
from coe.evaluation.tasks import TaskFile
from registry.spec import ExpertSpec

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_page_is_current() -> None:
    hint = "run: python -m coe.cli.config.reference > docs/configuration.md"
    assert PAGE.read_text(encoding="utf-8") == reference(), hint


def test_every_key_has_a_type_a_default_and_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 90
    for row in rows:
        key, kind, default, meaning = (cell.strip() for cell in row.strip("|").replace("\\|", "/").split(" | "))
        assert key and kind and default, row
        assert len(meaning) > 8 and meaning.endswith((".", "?")), row


@pytest.mark.parametrize("model", [Config, ExpertSpec, TaskFile])
def test_every_top_level_key_is_there(model: type[Config | ExpertSpec | TaskFile]) -> None:
    page = reference()
    assert all(f"| `{name}` |" in page for name in model.model_fields)


def test_docstrings_describe_names_one_by_one_or_together() -> None:
    class Documented:
        """First line, with a: not.

        a: one. b: two; it goes
        on. c, d: both.

        Another paragraph.
        """

    assert describe_names(Documented, ["a", "b", "c", "d", "e"]) == {
        "a": "One.",
        "b": "Two; it goes on.",
        "c": "Both.",
        "d": "Both.",
    }
