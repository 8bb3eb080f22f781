"""What the benchmarks of the vLLM engine share: equal arguments for all rivals, servers, and streamed requests.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
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
    """A model, its adapters by name, and options of the vLLM engine (`coe.config.VLLMConfig`).

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


def engine_options(n_adapters: int, *, max_num_seqs: int, kv_mib: int | None, rank: int, **more: Any) -> dict[str, Any]:
    """Options of an engine that serves so many adapters; none: without LoRA, which is faster."""
    cache = {} if kv_mib is None else {"kv_cache_bytes": kv_mib * 2**20}
    loras = {"max_loras": n_adapters, "max_cpu_loras": max(1, n_adapters), "max_lora_rank": rank}
    return {"max_num_seqs": max_num_seqs, **cache, **loras, **more}


def write_service(folder: Path, setup: Setup, port: int = 8000, *, hf: bool = False) -> Path:
    """A configuration of the model and its adapters on vLLM, and on the hf engine too if `hf`. Returns its path."""
    experts: list[dict[str, Any]] = []
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


def coe_command(*words: str) -> list[str]:
    """A command line of `coe`, run by this interpreter."""
    return [sys.executable, "-c", "from coe.cli.entry import main; main()", *words]


def server_command(setup: Setup, port: int) -> list[str]:
    """vLLM's OpenAI server, with the arguments that the engine gets in all other rivals.

    vLLM's build for CPUs has no working `vllm serve`; its module is the same server.
    """
    module = "vllm.entrypoints.openai.api_server"
    words = ["--model", str(setup.model), "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    for name, value in setup.arguments().items():
        words += _flag(name, value)
    if setup.adapters:
        words += ["--lora-modules", *(f"{name}={path}" for name, path in setup.adapters.items())]
    return [sys.executable, "-W", "ignore", "-m", module, *words, "--uvicorn-log-level", "warning"]


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]


@contextmanager
def running(command: Sequence[str], url: str, log: Path) -> Iterator[float]:
    """A server as a child process, ready to answer. Yields the seconds until then.

    Raises:
        RuntimeError: it ended, or is not ready within START_S; with the end of its log.
    """
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(list(command), stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while not _responds(f"{url}/health"):
                if process.poll() is not None or time.monotonic() - began > START_S:
                    raise RuntimeError(f"{command[:6]} does not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.2)
            yield time.monotonic() - began
        finally:
            _end(process)


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


@dataclass(frozen=True, slots=True)
class Served:
    """One answer: seconds to its first text and to its end, and its tokens."""

    first_s: float
    total_s: float
    prompt_tokens: int
    tokens: int


def chat_body(model: str, text: str, n_tokens: int) -> bytes:
    """A streamed, greedy chat request whose answer has exactly so many tokens."""
    return json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": n_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


async def stream(session: aiohttp.ClientSession, url: str, body: bytes) -> Served:
    """Send a chat request and read its events. Raises RuntimeError on anything but a whole answer."""
    start, first, usage = time.perf_counter(), 0.0, None
    async with session.post(f"{url}/v1/chat/completions", data=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{url} answered {response.status}: {(await response.read())[:300]!r}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if not first and any(choice["delta"].get("content") for choice in event.get("choices", ())):
                first = time.perf_counter() - start
            usage = event.get("usage") or usage
    if usage is None:
        raise RuntimeError(f"{url} sent no usage")
    total = time.perf_counter() - start
    return Served(first or total, total, usage["prompt_tokens"], usage["completion_tokens"])
