"""The engine process ends with the process that started it, also if that is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.integration]

PARENT = """
import sys, time
from pathlib import Path
from coe.engines.vllm.options import Options
from coe.engines.vllm.process import start

if __name__ == "__main__":
    llm = start("tiny", Path(sys.argv[1]), Options(dtype="float32", kv_cache_bytes=2**25, max_loras=0))
    [process] = llm.engine_core.resources.engine_manager.processes
    print("core", process.pid, flush=True)
    time.sleep(600)
"""


def test_no_process_is_left_after_the_parent_is_killed(tiny: Path, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script), str(tiny)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        line = next((line for line in parent.stdout if line.startswith("core")), "")
        children = psutil.Process(parent.pid).children(recursive=True)
        parent.send_signal(signal.SIGKILL)
    core = int(line.split()[1])
    assert core in {child.pid for child in children}
    ends = time.monotonic() + 30
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < ends, "the engine process outlives its parent"
        time.sleep(0.1)
