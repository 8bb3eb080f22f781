"""Settings of compositions, checked: each of these raises ConfigError that says what a setting must be."""

from __future__ import annotations

import math

from coe.errors import ConfigError


def check_name(what: str, name: object) -> None:
    """The name of an expert."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{what} must be the name of an expert, got {name!r}")


def check_count(what: str, count: object, *, least: int) -> None:
    """A whole number of at least `least`."""
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise ConfigError(f"{what} must be a whole number of at least {least}, got {count!r}")


def check_seconds(what: str, seconds: object) -> None:
    """A time of more than nothing, or None."""
    if seconds is not None and (not _is_number(seconds) or not seconds > 0):  # type: ignore[operator]
        raise ConfigError(f"{what} must be a number of seconds above 0, got {seconds!r}")


def check_temperature(what: str, temperature: object) -> None:
    """A temperature that samples, as a request may have it."""
    if not _is_number(temperature) or not 0 < temperature <= 2:  # type: ignore[operator]
        raise ConfigError(f"{what} must be a number in (0, 2], got {temperature!r}: at 0 every sample is the same")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
