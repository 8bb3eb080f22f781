"""The clients: their files, their environments, and how one is run against an endpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).parent
ENVIRONMENTS: Final = HERE.parents[1] / ".clients-venv"
"""Where `make clients` installs them."""
LONGEST_S: Final = 900
"""Seconds that all features of one client may take."""


@dataclass(frozen=True)
class Client:
    """One client: its name in the table, its file, and the folder of its environment."""

    name: str
    file: str
    environment: str

    def is_installed(self, environments: Path) -> bool:
        """Whether its environment is there."""
        if self.file.endswith(".mjs") and not (environments / self.environment / "node_modules" / "openai").exists():
            return False
        return shutil.which(self.command(environments)[0]) is not None

    def command(self, environments: Path) -> list[str]:
        """What runs its file, without the arguments of the file."""
        folder = (environments / self.environment).absolute()  # it runs in another folder
        if self.file.endswith(".mjs"):
            return ["node", str(HERE / self.file), "--modules", str(folder)]
        return [str(folder / "bin" / "python"), str(HERE / self.file)]


CLIENTS: Final = (
    Client("openai-python", "client_openai.py", "agents"),
    Client("openai for node", "client_node.mjs", "node"),
    Client("LangChain", "client_langchain.py", "agents"),
    Client("pydantic-ai", "client_pydantic_ai.py", "agents"),
    Client("LiteLLM", "client_litellm.py", "agents"),
    Client("instructor", "client_instructor.py", "openai2"),
    Client("llama-index", "client_llama_index.py", "openai2"),
    Client("lm-eval", "client_lm_eval.py", "benchmarks"),
    Client("guidellm", "client_guidellm.py", "benchmarks"),
    Client("vLLM bench", "client_vllm_bench.py", "benchmarks"),
)


def environment() -> dict[str, str]:
    """The variables of a client's process: one compute thread, no hub, and a key that is none."""
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **fixed}


def outcomes(client: Client, environments: Path, url: str, expert: str) -> Iterator[dict[str, Any]]:
    """The lines that a client's file prints, as they come: its version, then one a feature.

    Raises:
        RuntimeError: the file failed before its last feature; the message has the end of what it printed.
    """
    command = [*client.command(environments), "--url", url, "--expert", expert]
    log = environments / f"{client.file}.{expert}.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(), cwd=HERE
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
        status = process.wait(LONGEST_S)
    if status:
        raise RuntimeError(f"{client.file} ended with {status}: {log.read_text()[-2000:]}")
