"""Wall time and peak memory of a command: start-up of the CLI, memory of the demo.

    python benchmarks/footprint.py --repeat 9 -- coe --help
    python benchmarks/footprint.py -- make demo

The peak is that of the largest single process among the command and its waited-for children.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time


def measure(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds, and peak MiB of the largest process of one run."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = [part for part in options.command if part != "--"]
    if not command:
        parser.error("name a command after --")
    runs = [measure(command) for _ in range(options.repeat)]
    wall, cpu, memory = zip(*runs, strict=True)
    result = {
        "command": " ".join(command),
        "runs": len(runs),
        "median_s": round(statistics.median(wall), 3),
        "min_s": round(min(wall), 3),
        "median_cpu_s": round(statistics.median(cpu), 3),
        "peak_mib": round(max(memory)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
