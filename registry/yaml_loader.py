"""The YAML loader of the project: bounded in size, depth and integers, and without the surprises of YAML 1.1.

`1:30` and `010` are text, not the numbers 90 (to the base 60) and 8 (to the base 8): in the place of a number, an
error, and 10. The keys of a mapping are text as written, also `no`, `1_000` and `2026-01-01`.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

import yaml

from registry.errors import without_userinfo

_MOST_NODES = 200_000  # of a document with its aliases expanded
_MOST_LEVELS = 100
_MOST_BITS = 256  # of an integer
_MOST_BASE_60_CHARACTERS = 100  # of a number such as 190:20:30, whose conversion takes quadratic time
_YAML = "tag:yaml.org,2002:"
_NUMBERS = frozenset({f"{_YAML}int", f"{_YAML}float"})
_TEXT_IN_KEYS = _NUMBERS | {f"{_YAML}bool", f"{_YAML}timestamp", f"{_YAML}null"}
_LEADING_ZERO = re.compile(r"[-+]?0[0-7_]*[1-7][0-7_]*")
"""What YAML 1.1 reads as a number to the base 8."""


class BoundedLoader(yaml.SafeLoader):
    """A `yaml.SafeLoader` for hostile documents: size, depth and integers are bounded, every error is a YAMLError."""

    _level = 0
    _nodes = 0

    def get_single_node(self) -> yaml.Node | None:
        """The root node. Raises yaml.YAMLError if the document is malformed, too deep or too large."""
        root: yaml.Node | None = super().get_single_node()
        if root is not None:
            _expansion(root, {})
        return root

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, at most `_MOST_LEVELS` levels below the root."""
        self._level, self._nodes = self._level + 1, self._nodes + 1
        if self._level > _MOST_LEVELS:
            raise _too_deep(self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        if self._nodes > _MOST_NODES:
            text = f"more than {_MOST_NODES:,} values: split the file"
            raise yaml.composer.ComposerError(None, None, text, self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        self._level -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; scalars that PyYAML cannot convert (`2020-99-99`) are errors with a line."""
        if node.tag in _NUMBERS and ":" in node.value and len(node.value) > _MOST_BASE_60_CHARACTERS:
            text = (
                f"a number to the base 60 of more than {_MOST_BASE_60_CHARACTERS} characters (quote it if it is text)"
            )
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        if node.tag in _NUMBERS and (":" in node.value or _LEADING_ZERO.fullmatch(node.value)):
            return node.value
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
            kind = node.tag.rpartition(":")[2]
            text = f"{shortened(node.value)} is not a valid {kind} (quote it if it is text)"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark) from error
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            text = f"an integer of {value.bit_length()} bits; the most is {_MOST_BITS}"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        return value

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge `<<` into a mapping; its keys become text as written, where they are scalars."""
        super().flatten_mapping(node)
        node.value = [(_text_key(key), value) for key, value in node.value]


def _text_key(key: yaml.Node) -> yaml.Node:
    if not isinstance(key, yaml.ScalarNode) or key.tag not in _TEXT_IN_KEYS or not key.value:
        return key
    return yaml.ScalarNode(f"{_YAML}str", key.value, key.start_mark, key.end_mark)


def _expansion(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Number of nodes and of levels with aliases expanded; a node inside itself counts once."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = 1, 1
    parts = node.value if isinstance(node, yaml.CollectionNode) else ()
    children = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
    sizes = [_expansion(child, known) for child in children]
    size, levels = 1 + sum(size for size, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)
    if levels > _MOST_LEVELS:
        raise _too_deep(node.start_mark)
    if size > _MOST_NODES:
        text = f"more than {_MOST_NODES:,} values once aliases are expanded: split the file, or use fewer aliases"
        raise yaml.composer.ComposerError(None, None, text, node.start_mark)
    known[id(node)] = size, levels
    return size, levels


def _too_deep(mark: yaml.Mark) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, f"nested more than {_MOST_LEVELS} levels deep", mark)


_REPR = reprlib.Repr()  # unlike `repr`, bounded in time and size
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict = 4, 30, 30
_REPR.maxstring = _REPR.maxother = 200


def shortened(value: object) -> str:
    """A value in an error: at most 80 characters, without passwords."""
    text = without_userinfo(_REPR.repr(value))
    return text if len(text) <= 80 else text[:77] + "..."
