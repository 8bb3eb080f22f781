"""The blocks of the README run, in order, from a home that has only the base models."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.zoo.service import serving

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order; `""` are those without one."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [body for name, body in fenced if name == language]


@pytest.mark.integration
def test_every_block_runs_in_order(tmp_path: Path, zoo_bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(zoo_bases)
    # Not as part of the `make` that runs the tests, which would print the folders it enters and leaves.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    environment = outer | {
        "COE_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "N": "16",  # a short demo
        "SEED": "3",
    }
    commands = [block for block in blocks("bash") if block.strip() != "make test"]
    assert commands[0].strip() == "make demo"
    demo = run(["bash", "-euo", "pipefail", "-c", commands[0]], environment)
    summary = json.loads(demo.splitlines()[-1])
    assert summary["n"] == 16 and summary["experts_used"] >= 6
    assert summary["routed_accuracy"] >= summary["best_single_accuracy"] + 0.25
    [composed] = (summary[key] for key in ("two_skill_text_right", "two_skill_latent_right") if key in summary)
    assert summary["two_skill_n"] == 8 and composed >= summary["two_skill_best_single_right"] + 2

    assert summary["serve_p50_s"] > 0 and summary["batch_rows_per_s"] > 0
    example, client = blocks("python")
    first, second, unrouted = run([sys.executable, "-c", example], environment).strip().splitlines()[:3]
    assert first == "head -n 12 notes.txt" and second == "2031-03-14"
    assert unrouted != first

    [serve] = [block for block in commands if block.startswith("coe serve")]
    assert serve.split("#")[0].split() == ["coe", "serve", "--config", "examples/zoo/config.yaml"]
    monkeypatch.setenv("COE_HOME", str(home))
    with serving(ROOT / "examples/zoo/config.yaml") as url:
        said = run([sys.executable, "-c", client.replace("http://127.0.0.1:8000/v1", url)], environment)
    assert said.strip().splitlines() == ["shell says head -n 12 notes.txt", "head -n 12 notes.txt"]

    for block in commands[1:]:
        if block == serve:
            continue
        output = run(["bash", "-euo", "pipefail", "-c", block.replace("runs/", f"{tmp_path}/runs/")], environment)
        assert output.strip()


def test_the_tree_names_only_what_exists() -> None:
    [tree] = [block for block in blocks("") if "orchestrator.py" in block]
    parent = ROOT
    for line in tree.splitlines():
        names = [word for word in line[:21].split() if word.endswith((".py", "/"))]
        if not line.startswith(" "):
            parent = ROOT
        for name in names:
            assert (parent / name).exists(), name
        if not line.startswith(" ") and names:
            parent = ROOT / names[0]


def run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout
