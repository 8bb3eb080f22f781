"""What `make audit` makes of a report of pip-audit."""

from __future__ import annotations

from pathlib import Path

import audit
import pytest

SAFE = {"name": "a", "version": "1.0", "vulns": []}
WEAK = {"name": "b", "version": "2.0", "vulns": [{"id": "GHSA-1", "fix_versions": ["2.1"]}]}
UNKNOWN = {"name": "c", "skip_reason": "not found on PyPI"}


def test_a_vulnerability_fails_unless_it_is_accepted_with_a_reason() -> None:
    lines, failed = audit.judged([SAFE, WEAK], {})
    assert failed and lines == [
        "2 packages audited, 0 unknown to the database",
        "vulnerable: b 2.0: GHSA-1, fixed in ['2.1']",
    ]
    lines, failed = audit.judged([SAFE, WEAK], {"GHSA-1": "only on Windows"})
    assert not failed and "accepted: b 2.0: GHSA-1, fixed in ['2.1'] (only on Windows)" in lines


def test_an_accepted_one_that_is_gone_is_named() -> None:
    assert audit.judged([SAFE], {"GHSA-1": "old"})[0][-1] == "accepted.yaml: GHSA-1 is found no more; remove it"


def test_a_mirror_that_knows_nothing_is_no_audit() -> None:
    lines, failed = audit.judged([SAFE, UNKNOWN, UNKNOWN], {})
    assert not failed and lines[0].startswith("not audited: the database of vulnerabilities knows 1 of 3 packages")
    assert audit.judged([WEAK, UNKNOWN], {})[1], "half of them are enough"


def test_without_an_answer_nothing_is_audited(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: Path) -> list[dict[str, object]]:
        raise ValueError("pip-audit: no network")

    monkeypatch.setattr(audit, "audited", refused)
    assert audit.main([]) == 0 and capsys.readouterr().out == "not audited: pip-audit: no network\n"
