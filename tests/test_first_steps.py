"""docs/first-steps.md is true: its blocks run in order, on small real models."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "first-steps.md"


def blocks() -> list[str]:
    """The commands of the page, block by block."""
    return re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_the_page_goes_from_init_to_auto() -> None:
    steps = ("coe init", "coe config check", "coe ask", "coe chat", "coe eval", "coe outcomes check")
    steps += ("coe router train", "coe route ", "coe serve")
    text = "".join(blocks())
    places = [text.index(step) for step in steps]
    assert places == sorted(places)


@pytest.mark.integration
def test_every_command_runs_in_order(tmp_path: Path, zoo_bases: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(zoo_bases)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "COE_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    outputs: list[str] = []
    for block in blocks():
        here = block.replace("runs/first", f"{tmp_path}/first").replace("8000", str(port))
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", here], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr
        outputs.append(done.stdout + done.stderr)
    doctor, described, first, _, routed, auto, served = outputs
    assert "ok device" in doctor and "coe.yaml is valid: 3 experts" in described
    assert "Paris" in first and "rm old.log" in first and "2031-10-05" in first
    assert "shell" in routed and "expected score" in routed
    assert re.findall(r"^(\S+) \(\d+ tokens", auto, flags=re.MULTILINE) == ["shell"]
    assert re.findall(r"^(\S+):$", auto, flags=re.MULTILINE) == ["smollm2-135m-instruct", "dates"]
    assert '"model":"shell"' in served.replace(" ", "") and "smollm2-135m-instruct answered: policy default" in served
