from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from coe.cli.registry import app
from registry.errors import InvalidSpec, RegistryError, SourceError, UnknownExpert

FILE = """\
experts:
  - {name: sql, kind: adapter, base: smol, source: sql}
  - {name: smol, kind: model, source: base}
  - {name: gpt, kind: remote, source: "https://host/v1", context_length: 1000}
"""
PLACE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for folder in ("base", "sql"):
        (tmp_path / folder).mkdir()
    config = {"model_type": "llama", "max_position_embeddings": 64}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    save_file({f"{PLACE}.weight": np.ones((8, 8), np.float32)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "sql" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    lora = {f"base_model.model.{PLACE}.lora_{part}.weight": np.ones(shape, np.float32) for part, shape in
            {"A": (2, 8), "B": (8, 2)}.items()}  # fmt: skip
    save_file(lora, tmp_path / "sql" / "adapter_model.safetensors")
    path = tmp_path / "experts.yaml"
    path.write_text(FILE)
    return path


def run(*arguments: object, ok: bool = True) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert not ok or result.exit_code == 0, result.output
    return result


def run_json(*arguments: object, ok: bool = True) -> Any:
    return json.loads(run(*arguments, "--json", "-", ok=ok).stdout)


def test_apply_prints_its_plan_and_is_idempotent(file: Path) -> None:
    result = run("apply", file)
    assert "+ add sql" in result.stderr and "3 to add, 0 to update, 0 to remove, 0 unchanged" in result.stderr
    assert "warning: gpt: has no price" in result.stderr and result.stdout == ""
    again = run_json("apply", file)
    assert (again["registry_version"], again["applied"]) == (1, True)
    assert [(step["action"], step["name"], step["version"]) for step in again["steps"]] == [
        ("unchanged", "sql", 1), ("unchanged", "smol", 1), ("unchanged", "gpt", 1),
    ]  # fmt: skip


def test_a_dry_run_changes_nothing(file: Path) -> None:
    planned = run_json("apply", file, "--dry-run")
    assert not planned["applied"] and planned["registry_version"] == 0
    assert [(step["action"], step["version"]) for step in planned["steps"]] == [("add", None)] * 3
    assert run_json("list") == []
    assert "no expert is registered" in run("list").stdout


def test_an_update_names_the_fields_and_prune_removes(file: Path) -> None:
    run("apply", file)
    file.write_text(FILE.replace("context_length: 1000", "context_length: 2000"))
    assert "~ update gpt (context_length)" in run("apply", file).stderr
    file.write_text("\n".join(FILE.splitlines()[:3]))
    assert "- remove gpt" in run("apply", file, "--prune").stderr
    assert [spec["name"] for spec in run_json("list")] == ["smol", "sql"]


def test_every_problem_of_the_file_is_told(file: Path) -> None:
    file.write_text(FILE.replace("base: smol", "base: smal").replace("context_length", "contxt_length"))
    error = run("apply", file, ok=False).exception
    assert isinstance(error, InvalidSpec)
    assert str(error).splitlines() == [
        f"{file}:2: experts[0].base: 'smal' is not in this file or the registry; did you mean 'smol'?",
        f"{file}:4: experts[2].contxt_length: is not a known field; did you mean 'context_length'?",
    ]


def test_list_and_show(file: Path) -> None:
    run("apply", file)
    listed = run("list").stdout
    assert re.search(r"smol@1 +model +64 +256B +64 ", listed) and re.search(r"sql@1 +adapter +smol +32 ", listed)
    shown = run("show", "smol").stdout
    assert "model.safetensors" in shown and "sha256:" in shown and "llama" in shown
    spec = run_json("show", "sql@1")
    assert (spec["base"], spec["parameters_active"], spec["version"]) == ("smol", 96, 1)
    assert isinstance(run("show", "smoll", ok=False).exception, UnknownExpert)


def test_capabilities_are_stated_by_flags_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--kind", "remote", "--source", "https://host/v1", "--context-length", "100")
    run("add", "--name", "caller", *flags, "--capability", "tools", "--capability", "vision")
    run("add", "--name", "plain", *flags)
    assert run_json("show", "caller")["capabilities"] == ["chat", "tools", "vision"]
    assert run_json("show", "plain")["capabilities"] == ["chat"]
    assert "chat, tools, vision" in run("show", "caller").stdout
    listed = run("list").stdout
    assert re.search(r"caller@1 .* tools vision *$", listed, re.MULTILINE) and "chat" not in listed


def test_json_to_a_file_beside_the_table(file: Path, tmp_path: Path) -> None:
    run("apply", file)
    for command in (["list"], ["show", "gpt"]):
        assert "gpt" in run(*command, "--json", tmp_path / "out.json").stdout
        assert "gpt" in (tmp_path / "out.json").read_text()


def test_verify_says_which_file_is_not_as_it_was(file: Path) -> None:
    run("apply", file)
    assert [(row["expert"], row["ok"]) for row in run_json("verify")] == [
        ("gpt@1", None), ("smol@1", True), ("sql@1", True),
    ]  # fmt: skip
    weights = file.parent / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (file.parent / "sql" / "adapter_config.json").unlink()
    result = run("verify", ok=False)
    assert result.exit_code == 1
    assert "FAILED smol@1: the files of smol@1" in result.stderr and "model.safetensors differs" in result.stderr
    assert "adapter_config.json is missing" in result.stderr and "no files here gpt@1" in result.stderr
    weights.write_bytes(content[:-8])
    (row,) = run_json("verify", "smol", ok=False)
    assert not row["ok"] and "model.safetensors is truncated" in row["error"]
    weights.unlink()
    weights.with_name("config.json").unlink()
    weights.parent.rmdir()
    (row,) = run_json("verify", "smol", ok=False)
    assert "there is no folder" in row["error"]


def test_add_and_remove(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    flags = ("--licence", "mit", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
    spec = run_json("add", "--name", "smol", "--source", "base", "--tag", "a", "--tag", "b", *flags)
    assert (spec["tool_call_parser"], spec["reasoning_parser"]) == ("hermes", "qwen3")
    assert (spec["source"], spec["tags"], spec["licence"]) == (str(file.parent / "base"), ["a", "b"], "mit")
    assert (
        "registered sql@1"
        in run("add", "--name", "sql", "--source", "sql", "--kind", "adapter", "--base", "smol").stderr
    )
    run(
        "add", "--name", "gpt", "--kind", "remote", "--source", "https://h/v1", "--context-length", 9,
        "--model", "gpt-x",
        "--api-key-env", "KEY", "--input-usd-per-mtok", 1, "--output-usd-per-mtok", 2,
    )  # fmt: skip
    gpt = run_json("show", "gpt")
    assert gpt["price"] == {"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 2.0} and gpt["model"] == "gpt-x"
    error = run("remove", "smol", ok=False).exception
    assert isinstance(error, RegistryError) and "sql need it" in str(error)
    assert run_json("remove", "sql") == {"removed": "sql", "registry_version": 4}
    assert [spec["name"] for spec in run_json("list")] == ["gpt", "smol"]


def test_wrong_flags_are_all_told(file: Path) -> None:
    error = run("add", "--name", "auto", "--source", "x", "--kind", "modle", "--context-length", 0, ok=False).exception
    assert isinstance(error, InvalidSpec)
    assert [problem.place for problem in error.problems] == ["--name", "--kind", "--context-length"]
    error = run("add", "--name", "a", "--source", "x", "--kind", "adapter", ok=False).exception
    assert isinstance(error, InvalidSpec) and str(error).startswith("flags: an adapter needs `base`")
    assert isinstance(run("add", "--name", "a", "--source", file.parent / "no", ok=False).exception, SourceError)


def test_the_registry_may_be_elsewhere(file: Path, tmp_path: Path, coe_home: Path) -> None:
    url = f"sqlite:///{tmp_path}/other.db"
    run("apply", file, "--registry", url)
    assert run_json("list") == []
    listed = CliRunner().invoke(app, ["list", "--json", "-"], env={"COE_REGISTRY": url})
    assert len(json.loads(listed.stdout)) == 3


def test_large_numbers_are_short() -> None:
    from coe.cli.registry import _short

    assert [_short(count) for count in (None, 12, 1_500, 134_515_008, 7e9, 2e12)] == [
        "",
        "12",
        "1.5k",
        "135M",
        "7B",
        "2T",
    ]
    assert _short(7_000_000_000, "B") == "7GB"
