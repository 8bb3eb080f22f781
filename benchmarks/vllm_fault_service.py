"""A `coe serve` with a vLLM expert that `vllm_faults.py` disturbs, and a client that says how requests end."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil
import yaml
from vllm_fault_models import write_experts

from coe.engines.vllm.engine import PROCESS_BYTES
from coe.engines.vllm.process import on_cpu

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from serve_process import ServeProcess, starting, title

START_S: Final = 300.0
CACHE_BYTES: Final = 64 * 2**20
HANG_S: Final = 15.0
"""`engines.vllm.hang_timeout_s` of the service."""
KILL_ACTOR: Final = """
import ray, sys
ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False, logging_level="ERROR")
[name] = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if "#hosts#" in each["name"]]
ray.kill(ray.get_actor(name, namespace="serve"))
"""


@dataclass(frozen=True)
class Outcome:
    """The end of one request. `kind`: answered, broken (after its first text), refused (before it) or hung."""

    kind: str
    text: str = ""
    status: int = 200
    error: str = ""


class Service:
    """A running `coe serve` with one host."""

    def __init__(self, running: ServeProcess) -> None:
        self._running = running
        self.process, self.url, self.everything = running.process, running.url, running.everything

    @property
    def screen(self) -> str:
        """Everything printed so far."""
        return self._running.screen

    def parts(self, words: str) -> list[psutil.Process]:
        """Its processes whose title has these words."""
        return [each for each in self.everything() if words in title(each)]

    def titles(self, processes: Sequence[psutil.Process]) -> list[str]:
        """The titles of processes, cut."""
        return [title(each)[:60] for each in processes]

    @property
    def host(self) -> psutil.Process:
        """The process of the expert host."""
        [host] = self.parts("ray::ServeReplica:coe:hosts")
        return host

    @property
    def core(self) -> psutil.Process:
        """vLLM's engine process."""
        [core] = self.parts("EngineCore")
        return core

    async def wait_until_ready(self) -> float:
        """Seconds until it says that it is ready."""
        began = time.monotonic()
        while "Ctrl-C  stops" not in self.screen:
            if self.process.poll() is not None or time.monotonic() - began > START_S:
                raise RuntimeError(f"`coe serve` does not start:\n{self.screen[-3000:]}")
            await asyncio.sleep(0.2)
        return time.monotonic() - began

    def kill_actor(self) -> None:
        """`ray.kill` of the host."""
        [raylet, *_] = self.parts("--gcs-address=") or self.parts("--gcs_address=")
        address = next(word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--gcs"))
        environment = {**os.environ, "RAY_AUTH_MODE": "token"}  # as `coe serve` sets it
        subprocess.run([sys.executable, "-c", KILL_ACTOR, address], check=True, timeout=60, env=environment)


class Client:
    """Sends requests to a service and says how they ended."""

    def __init__(self, session: aiohttp.ClientSession, url: str, tokens: int, limit_s: float) -> None:
        self._session, self._url, self._tokens, self._limit_s = session, url, tokens, limit_s
        self.with_text = 0

    async def ask(self, model: str, prompt: str, *, stream: bool = False, tokens: int | None = None) -> Outcome:
        """One request, to its end or the limit."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens or self._tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stream": stream}
        try:
            async with (
                asyncio.timeout(self._limit_s),
                self._session.post(f"{self._url}/v1/completions", json=body) as response,
            ):
                if response.status != 200:
                    error = (await response.json())["error"]["message"]
                    return Outcome("refused", status=response.status, error=error[:200])
                return await (self._events(response) if stream else self._whole(response))
        except TimeoutError:
            return Outcome("hung")
        except aiohttp.ClientError as error:
            return Outcome("refused", status=0, error=f"{type(error).__name__}: {error}"[:200])

    async def _whole(self, response: aiohttp.ClientResponse) -> Outcome:
        body = await response.json()
        return Outcome("answered", body["choices"][0]["text"])

    async def _events(self, response: aiohttp.ClientResponse) -> Outcome:
        text, finished = "", False
        try:
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return Outcome("broken" if text else "refused", text, error=str(event["error"]["message"])[:200])
                for choice in event["choices"]:
                    self.with_text += not text and bool(choice["text"])
                    text += choice["text"]
                    finished = finished or choice["finish_reason"] is not None
        except aiohttp.ClientError as error:
            return Outcome("broken" if text else "refused", text, error=f"{type(error).__name__}: {error}"[:200])
        return Outcome("answered", text) if finished else Outcome("broken", text, error="the stream ended early")

    async def health(self) -> dict[str, Any]:
        """The body of `/health`; empty if it cannot be read now."""
        with suppress(aiohttp.ClientError, TimeoutError, json.JSONDecodeError):
            async with asyncio.timeout(5), self._session.get(f"{self._url}/health") as response:
                body: dict[str, Any] = await response.json()
                return body
        return {}


@contextmanager
def serving(folder: Path, model: Path | None, environment: dict[str, str]) -> Iterator[Service]:
    """A service on experts in `folder`; whatever is left of it is killed at the end."""
    experts = write_experts(folder, model)
    options: dict[str, Any] = {"max_num_seqs": 16, "max_loras": 2, "max_cpu_loras": 4, "max_lora_rank": 8}
    options |= {"hang_timeout_s": HANG_S, "dtype": "float32" if on_cpu() else "bfloat16", "kv_cache_bytes": CACHE_BYTES}
    weights = 2 * sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    budget = int(1.5 * (weights + CACHE_BYTES + (PROCESS_BYTES if on_cpu() else 0)))  # one slot
    config: dict[str, Any] = {"experts": ["experts.yaml"], "engines": {"vllm": options}, "host": {"budget": budget}}
    config |= {"policies": {"default": {"expert": "base"}}}
    config["serve"] = {"pools": [{"pins": [], "threads": 1}]}
    with starting(folder, yaml.safe_dump(config), yaml.safe_dump({"experts": experts}), **environment) as running:
        yield Service(running)


def lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
