"""What the tests of the commands share."""

from __future__ import annotations

import pytest

from coe.cli import interrupts


@pytest.fixture(autouse=True)
def no_signal_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals belong to the process: what an earlier test has sent says nothing about this one."""
    monkeypatch.setattr(interrupts, "_seen", interrupts._Seen(report=interrupts._seen.report))
