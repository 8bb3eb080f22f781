"""The Dockerfile: linted, and built where a Docker daemon runs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Dockerfile").read_text()


def test_it_has_no_warnings() -> None:
    program = shutil.which("hadolint", path=str(Path(pytest.__file__).parents[4] / "bin")) or shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([program, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_what_it_copies_exists_and_is_sent_to_the_daemon() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+)$", TEXT, re.M) for name in line.split()[:-1]]
    assert sorted(copied) == sorted(sent)
    assert all((ROOT / name).exists() for name in copied)
    assert "coe.yaml" in TEXT.splitlines()[-1] and '"0.0.0.0"' in TEXT.splitlines()[-1]


@pytest.mark.slow
def test_it_is_built_and_shows_its_help() -> None:
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("no Docker daemon runs here")
    subprocess.run(["docker", "build", "-t", "coe-test", ROOT], check=True, timeout=3600)
    shown = subprocess.run(["docker", "run", "--rm", "coe-test", "--help"], capture_output=True, text=True, check=True)
    assert " serve " in shown.stdout
