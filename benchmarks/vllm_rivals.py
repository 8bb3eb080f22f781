"""What the benchmarks of the vLLM engine share: equal arguments for all rivals, and servers.

The arguments are those that `coe.engines.vllm` gives to vLLM, so rivals differ only in what is around the engine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml

from coe.engines.vllm.options import Options
from coe.engines.vllm.process import environment, on_cpu

MODEL = "base"
"""Name of the model in every rival."""
HF = "-hf"
"""Ending of the names that the hf engine serves."""
OWN_FORM = ("worker_extension_cls", "model", "tokenizer", "served_model_name", "use_tqdm_on_load")
"""Arguments that a rival does not get, or states in its own form."""
START_S = 300.0
STOP_S = 30.0


@dataclass(frozen=True)
class Setup:
    """A model, its adapters by name, and options of the vLLM engine (`coe.engine_config.VLLMConfig`).

    threads: of each engine process, where it computes on a CPU.
    """

    model: Path
    adapters: Mapping[str, Path]
    options: Mapping[str, Any]
    threads: int = 1

    def arguments(self) -> dict[str, Any]:
        """Arguments of vLLM's EngineArgs, without the model."""
        found = Options(**self.options).arguments(self.model, MODEL, on_cpu=on_cpu(), with_ray=False)
        return {name: value for name, value in found.items() if name not in OWN_FORM and value is not None}

    def prepare_process(self) -> None:
        """Set what engine processes inherit. Call it before vLLM or torch is imported."""
        eager = on_cpu() and Options(**self.options).runs_eagerly(on_cpu=True)
        for name, value in environment(eager_on_cpu=eager).items():
            os.environ.setdefault(name, value)
        if on_cpu():
            os.environ.update(OMP_NUM_THREADS=str(self.threads), OMP_WAIT_POLICY="PASSIVE")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.update({"RAY_worker_niceness": "0"})  # Ray lowers the priority of its processes; all rivals have one


def engine_options(n_adapters: int, *, max_num_seqs: int, kv_mib: int | None, rank: int, **more: Any) -> dict[str, Any]:
    """Options of an engine that serves so many adapters; none: without LoRA, which is faster."""
    cache = {} if kv_mib is None else {"kv_cache_bytes": kv_mib * 2**20}
    loras = {"max_loras": n_adapters, "max_cpu_loras": max(1, n_adapters), "max_lora_rank": rank}
    return {"max_num_seqs": max_num_seqs, **cache, **loras, **more}


def write_service(
    folder: Path, setup: Setup, port: int = 8000, *, hf: bool = False, more: Mapping[str, Path] = MappingProxyType({})
) -> Path:
    """A configuration of the model and its adapters on vLLM. Returns its path.

    Args:
        hf: the hf engine serves them too, under names with the ending HF.
        more: further models on vLLM, by name.
    """
    experts: list[dict[str, Any]] = [
        {"name": name, "kind": "model", "source": str(path.resolve()), "engine": "vllm"} for name, path in more.items()
    ]
    for engine, ending in (("vllm", ""), ("hf", HF))[: 1 + hf]:
        base = MODEL + ending
        experts.append({"name": base, "kind": "model", "source": str(setup.model.resolve()), "engine": engine})
        for name, path in setup.adapters.items():
            adapter = {"name": name + ending, "kind": "adapter", "base": base, "source": str(path.resolve())}
            experts.append(adapter)
    (folder / "experts.yaml").write_text(yaml.safe_dump({"experts": experts}))
    service = {
        "experts": ["experts.yaml"],
        "engines": {
            "vllm": dict(setup.options),
            "hf": {
                "dtype": setup.options.get("dtype", "auto"),
                "threads": setup.threads,
                "max_batch": setup.options["max_num_seqs"],
            },
        },
        "policies": {"default": {"expert": MODEL}},
        "serve": {
            "port": port,
            "pools": [{"pins": [MODEL], "threads": setup.threads}],
            "log": {"folder": "decisions"},
        },
        "batch": {"hosts": {"threads": setup.threads}},
    }
    path = folder / "service.yaml"
    path.write_text(yaml.safe_dump(service))
    return path


def end_on_sigterm() -> None:
    """Let a SIGTERM, such as that of `timeout`, end this process in order: its servers must not outlive it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def coe_command(*words: str) -> list[str]:
    """A command line of `coe`, run by this interpreter."""
    return [sys.executable, "-c", "from coe.cli.entry import main; main()", *words]


def server_command(setup: Setup, port: int) -> list[str]:
    """vLLM's OpenAI server (`vllm serve`), with the arguments that the engine gets in all other rivals.

    In the build for CPUs, `vllm serve` fails for lack of the package's metadata; its module is the same server.
    """
    start = ["vllm.entrypoints.cli.main", "serve", str(setup.model)]
    if on_cpu():
        start = ["vllm.entrypoints.openai.api_server", "--model", str(setup.model)]
    words = ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    for name, value in setup.arguments().items():
        words += _flag(name, value)
    if setup.adapters:
        words += ["--lora-modules", *(f"{name}={path}" for name, path in setup.adapters.items())]
    return [sys.executable, "-W", "ignore", "-m", *start, *words, "--uvicorn-log-level", "warning"]


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]


@dataclass(frozen=True)
class Server:
    """A server as a child process."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    began_s: float
    within_s: float

    def ready(self) -> float:
        """Wait until it answers; returns the seconds from its start.

        Raises:
            RuntimeError: it ended, or needs more than `within_s` seconds; with the end of its log.
        """
        while not _responds(f"{self.url}/health"):
            if self.process.poll() is not None or time.monotonic() - self.began_s > self.within_s:
                raise RuntimeError(f"{self.process.args!r} does not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)
        return time.monotonic() - self.began_s

    def cpu_s(self) -> float:
        """CPU time of it and all that it started."""
        return tree_cpu_s(psutil.Process(self.process.pid))


@contextmanager
def started(command: Sequence[str], url: str, log: Path, within_s: float = START_S) -> Iterator[Server]:
    """A server that has begun to start; it ends with the block."""
    with log.open("wb") as out:
        process = subprocess.Popen(list(command), stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield Server(url, process, log, time.monotonic(), within_s)
    finally:
        _end(process)


def own_cpu_s(servers: Collection[Server]) -> float:
    """CPU time of this process and its children, without those servers."""
    others = {server.process.pid for server in servers}
    children = [each for each in psutil.Process().children() if each.pid not in others]
    return time.process_time() + sum(map(tree_cpu_s, children))


def tree_cpu_s(root: psutil.Process) -> float:
    total = 0.0
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.Error):  # ended meanwhile
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _responds(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # urllib's errors too
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop it in order, then kill what is left in its session."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
