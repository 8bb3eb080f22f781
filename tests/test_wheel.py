"""The wheel alone, outside the repository: it has all it needs, and its commands work with the fake engine."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXPERTS = """
experts:
  - {name: upper, kind: model, source: "fake://upper"}
  - {name: echo, kind: model, source: "fake://echo"}
"""
SERVICE = """
experts: [experts.yaml]
policies:
  default: {expert: upper}
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    _run([sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, ROOT], folder)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the commands of an environment that has the wheel, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    offline = ["--no-index", "--no-deps", "--disable-pip-version-check", "--quiet"]
    _run([sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel], folder)
    # A path in a .pth file is not searched for .pth files itself: the editable install of this repository is not seen.
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "bin"


def test_the_wheel_has_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    listed = _run(["git", "ls-files", "coe", "routers", "registry"], ROOT).split()
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == set(listed)


def test_init_and_ask_work_in_an_empty_folder(commands: Path, tmp_path: Path) -> None:
    where = _run([commands / "python", "-c", "import coe; print(coe.__file__)"], tmp_path).strip()
    assert Path(where).is_relative_to(commands.parent), "not this repository"
    _run([commands / "coe", "init"], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"experts.yaml", "coe.yaml"}
    (tmp_path / "experts.yaml").write_text(EXPERTS)
    (tmp_path / "coe.yaml").write_text(SERVICE)
    said = json.loads(_run([commands / "coe", "ask", "hello there", "--config", "coe.yaml", "--json", "-"], tmp_path))
    assert (said["expert"], said["text"]) == ("upper", "HELLO THERE")


def _run(command: list[str | Path], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(each) for each in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
