"""Checks of router settings: a value out of range is refused by the name of its setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from routers.errors import InvalidSettings


def check_range(settings: Any, *names: str, low: float = 0.0, high: float = math.inf) -> None:
    """Refuse attributes that are not finite numbers in [low, high]; `None` is passed over.

    Raises:
        InvalidSettings: names the setting, its range and its value.
    """
    for name in names:
        value = getattr(settings, name)
        if value is None or (low <= value <= high and math.isfinite(value)):
            continue
        bounds = f"be at least {low:g}" if value < low else "be finite"
        raise InvalidSettings(
            f"{name} must {bounds if high == math.inf else f'lie in [{low:g}, {high:g}]'}, got {value}"
        )


def check_positive(settings: Any, *names: str) -> None:
    """Refuse attributes that are not finite numbers above 0; `None` is passed over.

    Raises:
        InvalidSettings: names the setting and its value.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InvalidSettings(f"{name} must be positive, got {value}")


def check_choice(settings: Any, name: str, choices: Sequence[str]) -> None:
    """Refuse an attribute that is none of the choices.

    Raises:
        InvalidSettings: names the setting, the choices and the value.
    """
    value = getattr(settings, name)
    if value not in choices:
        raise InvalidSettings(f"{name} must be one of {', '.join(choices)}, got {value!r}")
