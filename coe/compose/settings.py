"""Checks of composition settings; each raises ConfigError with what the setting must be."""

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
    """A number of seconds above 0, or None."""
    if seconds is not None and (not _is_number(seconds) or not seconds > 0):  # type: ignore[operator]
        raise ConfigError(f"{what} must be a number of seconds above 0, got {seconds!r}")


def check_temperature(what: str, temperature: object) -> None:
    """A sampling temperature in (0, 2]."""
    if not _is_number(temperature) or not 0 < temperature <= 2:  # type: ignore[operator]
        raise ConfigError(f"{what} must be a number in (0, 2], got {temperature!r}: at 0 every sample is the same")


def check_share(what: str, share: object) -> None:
    """A number in (0, 1]."""
    if not _is_number(share) or not 0 < share <= 1:  # type: ignore[operator]
        raise ConfigError(f"{what} must be a number in (0, 1], got {share!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
