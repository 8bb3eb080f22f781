"""A mixture of experts as users load it; and the engine process ends with the one that started it, also if killed."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from engine_models import make_tokenizer, say

from coe.engines.hf.engine import HFEngine
from coe.types import GenerateRequest
from registry.inspection import inspect
from registry.spec import ExpertSpec, Kind

PARENT = """
import asyncio, json, os, sys, time
import psutil
from coe import GenerateRequest, open_local

async def main():
    async with open_local(sys.argv[1]) as system:
        chunks = system.host.ask("moe", GenerateRequest(prompt="the end", max_tokens=8))
        text = "".join([chunk.text async for chunk in chunks])
        children = [child.pid for child in psutil.Process().children(recursive=True)]
        print(json.dumps({"children": children, "text": text}), flush=True)
        time.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""
CONFIG = """
experts: [experts.yaml]
host: {budget: 4GiB}
engines: {vllm: {dtype: float32, kv_cache_bytes: 32MiB, max_loras: 0}}
"""


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random mixture of four experts, of which two answer each token."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    tokenizer, folder = make_tokenizer(), tmp_path_factory.mktemp("moe")
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_its_active_parameters_are_those_of_the_chosen_experts(moe: Path) -> None:
    facts = inspect(moe)
    one_expert = 2 * 3 * 64 * 128
    assert facts.parameters_total - facts.parameters_active == 2 * one_expert


@pytest.mark.vllm
@pytest.mark.integration
def test_it_answers_as_on_the_hf_engine_and_no_process_is_left_after_a_kill(moe: Path, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    config = tmp_path / "coe.yaml"
    config.write_text(CONFIG)
    expert = {"name": "moe", "kind": "model", "source": str(moe), "engine": "vllm"}
    (tmp_path / "experts.yaml").write_text(json.dumps({"experts": [expert]}))
    with subprocess.Popen([sys.executable, str(script), str(config)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        line = next(line for line in parent.stdout if line.startswith("{"))
        said = json.loads(line)
        children = [psutil.Process(pid) for pid in said["children"]]
        assert children
        parent.send_signal(signal.SIGKILL)
    ends = time.monotonic() + 30
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < ends, "the engine process outlives its parent"
        time.sleep(0.1)
    assert said["text"] == asyncio.run(answer_of_hf(moe)).rstrip("\ufffd")


async def answer_of_hf(folder: Path) -> str:
    engine = HFEngine(device="cpu", dtype="float32")
    expert = await engine.load(ExpertSpec(name="moe", kind=Kind.MODEL, source=str(folder)), folder)
    said = await say(expert, GenerateRequest(prompt="the end", max_tokens=8))
    await engine.unload(expert)
    return said.text
