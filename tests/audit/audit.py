"""`make audit`: known vulnerabilities of the pinned packages, by pip-audit.

    python tests/audit/audit.py --constraints constraints.txt --accepted tests/audit/accepted.yaml

The exit status is 1 if a package has a vulnerability that accepted.yaml does not name with a reason. Where the database
of vulnerabilities does not know most packages (a mirror, no network), nothing was audited: that is said, and is no
failure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

TIMEOUT_S = 300.0
MOST_UNKNOWN = 0.5
"""Share of packages that the database may not know: builds of other indexes are not in it."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraints", type=Path, default=Path("constraints.txt"))
    parser.add_argument("--accepted", type=Path, default=Path(__file__).parent / "accepted.yaml")
    given = parser.parse_args(arguments)
    try:
        report = audited(given.constraints)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        print(f"not audited: {error}")
        return 0
    lines, failed = judged(report, yaml.safe_load(given.accepted.read_text()) or {})
    print("\n".join(lines))
    return int(failed)


def audited(constraints: Path) -> list[dict[str, Any]]:
    """What pip-audit says of each package. Raises ValueError if it says nothing."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(constraints), "--no-deps", "--disable-pip"]
    done = subprocess.run(
        [*command, "--progress-spinner", "off", "-f", "json"], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if not done.stdout.strip():
        raise ValueError(f"pip-audit: {done.stderr.strip()[-300:]}")
    packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    return packages


def judged(report: Sequence[Mapping[str, Any]], accepted: Mapping[str, str]) -> tuple[list[str], bool]:
    """What to print, and whether a vulnerability is left that nobody has accepted."""
    unknown = [package["name"] for package in report if "skip_reason" in package]
    if len(unknown) > MOST_UNKNOWN * len(report):
        said = (
            f"not audited: the database of vulnerabilities knows {len(report) - len(unknown)} of {len(report)} packages"
        )
        return [f"{said}; run `make audit` where pypi.org is reachable"], False
    found = {
        each[
            "id"
        ]: f"{package['name']} {package['version']}: {each['id']}, fixed in {each['fix_versions'] or 'none yet'}"
        for package in report
        for each in package.get("vulns", ())
    }
    left = {name: line for name, line in found.items() if name not in accepted}
    lines = [f"{len(report) - len(unknown)} packages audited, {len(unknown)} unknown to the database"]
    lines += [f"accepted: {found[name]} ({accepted[name]})" for name in found if name in accepted]
    lines += [f"accepted.yaml: {name} is found no more; remove it" for name in accepted if name not in found]
    lines += [f"vulnerable: {line}" for line in left.values()]
    return lines, bool(left)


if __name__ == "__main__":
    sys.exit(main())
