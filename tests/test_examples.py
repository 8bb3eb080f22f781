"""The examples run as their first lines describe, without downloads, and print the documented output."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NUMBERED = sorted(EXAMPLES.glob("0*.py"))


def run(name: str, folder: Path, *arguments: str) -> str:
    """The output of an example that runs in an empty folder."""
    environment = os.environ | {"COE_HOME": str(folder / "home"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_they_are_short_and_use_the_public_interface_only() -> None:
    assert [path.stem for path in NUMBERED] == ["01_ask", "02_train_router", "03_custom_router", "04_serve"]
    for path in NUMBERED:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 40, path
        assert f"python examples/{path.name}" in (ast.get_docstring(ast.parse(text)) or ""), path
        modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        ours = {module for module in modules if module and module.split(".")[0] in ("coe", "routers", "registry")}
        assert ours <= {"coe", "routers", "registry"}, path


def test_ask(tmp_path: Path) -> None:
    assert run("01_ask", tmp_path).splitlines() == [
        "Paris",
        "policy default chose capitals: the policy names this expert",
        "Tokyo",
    ]


def test_train_router(tmp_path: Path) -> None:
    assert run("02_train_router", tmp_path, "trained").splitlines() == [
        "accuracy 1.00, best single expert 0.50",
        "What is the capital of Peru? -> capitals",
        "How much is 70 + 80? -> sums",
    ]
    assert (tmp_path / "trained" / "router.json").is_file()


def test_custom_router(tmp_path: Path) -> None:
    assert run("03_custom_router", tmp_path) == "sums\n"
    assert '"kind": "__main__:Digits"' in (tmp_path / "my-router" / "router.json").read_text()


@pytest.mark.integration
def test_serve(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = run("04_serve", tmp_path, str(EXAMPLES / "tiny" / "service.yaml"), str(port))
    assert "models: auto, coe/default, coe/sums, capitals, echo, sums\n" in said
    assert said.rstrip().splitlines()[-1] == "capitals: Paris"
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the service is gone"
