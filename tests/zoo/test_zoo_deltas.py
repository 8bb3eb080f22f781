"""A real adapter of the zoo, and its base with the adapter merged, as deltas: the same answers in fewer bytes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from coe.cli.registry import app
from coe.local import open_local
from examples.zoo.families import FAMILIES, Split
from examples.zoo.outcomes import ZOO
from examples.zoo.tasks import write_task

pytestmark = pytest.mark.integration

EXPERTS = """
experts:
  - {{name: smollm2, kind: model, source: {base}}}
  - {{name: units, kind: adapter, base: smollm2, source: {zoo}/adapters/units}}
  - {{name: merged, kind: model, source: merged}}
"""
SERVICE = "host: {budget: 2GiB}\nengines: {hf: {dtype: float32}}\npolicies: {default: {expert: units}}\n"


@pytest.fixture
def root(tmp_path: Path, zoo_bases: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    base = zoo_bases / "smollm2-135m-instruct"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(ZOO / "adapters" / "units")).merge_and_unload().save_pretrained("merged")
    AutoTokenizer.from_pretrained(base).save_pretrained("merged")
    Path("experts.yaml").write_text(EXPERTS.format(base=base, zoo=ZOO))
    Path("service.yaml").write_text(SERVICE)
    rows = FAMILIES["units"].rows(Split.VALID, 6, seed=3)
    Path("tasks").mkdir()
    write_task(FAMILIES["units"], {str(i): row for i, row in enumerate(rows)}, Path("tasks"))
    run("apply", "experts.yaml")
    return tmp_path


def run(*arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result


async def answers(*experts: str) -> list[str]:
    async with open_local("service.yaml") as system:
        return [await system.ask("How many metres are 7.5 km?", model=name, max_tokens=12) for name in experts]


def test_they_keep_their_answers_in_fewer_bytes(root: Path) -> None:
    before = asyncio.run(answers("units", "merged"))
    options = ("--method", "compeft", "--density", "50", "--alpha", "1", "--tasks", "units", "--max-loss", "20")
    lora = json.loads(run("compress", "units", "-c", "service.yaml", *options, "--json", "-").stdout)
    assert lora["registered"] == "units@2" and lora["bytes_after"] < lora["bytes_before"] / 8
    assert lora["trials"][0]["score_before"] >= 0.8
    exact = json.loads(run("compress", "merged", "--base", "smollm2", "--json", "-").stdout)
    assert exact["registered"] == "merged@2" and exact["bytes_after"] < exact["bytes_before"] / 10
    after = asyncio.run(answers("units", "merged"))
    assert after[1] == before[1] and after[0]
