"""`coe registry compress` over tiny models: what is stored, what is refused, and what stays when it fails."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tuned_experts import TUNED_SHARE, answers, save_experts, write_task
from typer.testing import CliRunner, Result

from coe.cli.registry import app
from coe.errors import ConfigError
from registry.deltas.payload import PayloadWriter
from registry.deltas.writing import Compression
from registry.digest import identity
from registry.errors import DiskFull, RegistryError
from registry.profiles import Measure, ProfileRow
from registry.store import Registry


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_experts(tmp_path_factory.mktemp("experts"))


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The registered experts, and tasks whose right answers are theirs."""
    root = Path(shutil.copytree(made, tmp_path / "service"))
    monkeypatch.chdir(root)
    run("apply", "experts.yaml")
    for name in ("tuned", "small"):
        write_task(root / "tasks", f"of-{name}", _right(name))
    return root


@cache
def _right(name: str) -> list[str]:
    """The answers of an expert, which are the same in every test."""
    return said(name)


def said(name: str) -> list[str]:
    return asyncio.run(answers(Path("service.yaml"), name))


def run(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def compress(name: str, *arguments: object, status: int = 0) -> Any:
    return json.loads(run("compress", name, "-c", "service.yaml", *arguments, "--json", "-", status=status).stdout)


def failure(*arguments: object) -> BaseException:
    error = run("compress", *arguments, status=1).exception
    assert error is not None
    return error


def unchanged(coe_home: Path) -> None:
    """The registry has the first versions, and no file of a delta is left."""
    with Registry() as registry:
        assert {spec.ref for spec in registry.list()} == {"base@1", "small@1", "tuned@1"}
    left = [path for folder in ("deltas", "restored") for path in (coe_home / folder).rglob("*")]
    assert left == []


def test_the_smallest_density_within_the_loss_is_stored(root: Path, coe_home: Path) -> None:
    before = said("tuned")
    percent = 100 * TUNED_SHARE
    done = compress(
        "tuned", "--method", "compeft", "--density", f"{percent + 1},0.5", "--base", "base", "--tasks", "of-tuned"
    )
    small, enough = done["trials"]
    assert (small["density"], small["accepted"], enough["density"], enough["accepted"]) == (
        0.005, False, pytest.approx(TUNED_SHARE + 0.01), True,
    )  # fmt: skip
    assert small["score_before"] == enough["score_before"] == 1 and small["loss_points"] > 1
    assert enough["score_after"] == 1 and enough["alpha"] == 1.0 and small["rows"] == 6  # four of ten tune alpha
    assert done["registered"] == "tuned@2" and done["base"] == "base"
    assert done["bytes_after"] < done["bytes_before"] / 8
    with Registry() as registry:
        spec = registry.get("tuned")
        assert spec.source == done["source"] and spec.delta_base == "base"
        assert registry.get("tuned@1").source == str(root / "tuned")
    assert said("tuned") == before
    run("verify")
    assert [path.name for path in (coe_home / "deltas").iterdir()] == [spec.source.rpartition("/")[2]]


def test_a_loss_beyond_the_stated_one_changes_nothing(root: Path, coe_home: Path) -> None:
    options = ("--method", "compeft", "--density", "0.5", "--alpha", "1", "--base", "base", "--tasks", "of-tuned")
    done = compress("tuned", *options, status=1)
    assert not done["stored"] and done["registered"] is None
    [trial] = done["trials"]
    assert trial["rows"] == 10 and trial["loss_points"] > 1  # one alpha: all rows judge
    unchanged(coe_home)
    stored = compress("tuned", *options, "--max-loss", "100")
    assert stored["trials"] == [trial | {"accepted": True}] and stored["registered"] == "tuned@2"


def test_exact_is_the_same_expert_in_fewer_bytes(root: Path) -> None:
    with Registry() as registry:
        before = registry.snapshot().experts
    done = compress("tuned", "--base", "base")
    assert done["trials"][0]["score_before"] is None and done["bytes_after"] < done["bytes_before"]
    with Registry() as registry:
        after = registry.snapshot().experts
    assert after["tuned"].version == 2
    assert identity(after["tuned"], after) == identity(before["tuned"], before)
    with pytest.raises(ConfigError, match="tuned@2 is compressed already"):
        raise failure("tuned", "--base", "base")
    done = compress("small", "--tasks", "of-small", "--max-loss", "0", status=1)  # random: nothing to compress
    assert not done["stored"] and done["trials"][0]["size_bytes"] >= done["bytes_before"]
    assert [done["trials"][0][name] for name in ("score_before", "score_after", "rows")] == [1, 1, 10]


def test_an_adapter_is_measured_on_the_tasks_of_its_profile(root: Path) -> None:
    with pytest.raises(ConfigError, match="has no profile on tasks that would measure the loss"):
        raise failure("small", "-c", "service.yaml", "--method", "compeft")
    with Registry() as registry:
        now = identity(registry.get("small"), registry.snapshot().experts)
        registry.record([ProfileRow("small", now, "task/of-small", "d", "skill", Measure(1.0, 1))])
    done = compress("small", "--method", "compeft", "--density", "50", "--max-loss", "100")
    assert done["registered"] == "small@2" and done["base"] is None and done["trials"][0]["rows"] == 6
    with Registry() as registry:
        assert registry.get("small").base == "base" and registry.get("small").delta_base is None
    assert len(said("small")) == 10


def test_a_full_disk_is_one_clear_error(root: Path, coe_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PayloadWriter, "add", full)
    error = failure("tuned", "--base", "base")
    assert isinstance(error, DiskFull) and "no space left to write" in str(error)
    unchanged(coe_home)


def test_an_interrupt_changes_nothing_and_names_the_command(
    root: Path, coe_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coe.cli.compress.search.mean_score", stop)
    result = run("compress", "tuned", "-c", "service.yaml", "--base", "base", "--tasks", "of-tuned", status=130)
    assert "nothing was changed; the same command goes on from the answers so far" in result.stderr
    unchanged(coe_home)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tuned",), "name the model that tuned@1 was fine-tuned from: --base NAME"),
        (("tuned", "--base", "tuned"), "--base tuned: there is no such other model; models here: base"),
        (("small", "--base", "tuned"), "small@1 is an adapter, whose own weights are compressed: leave --base out"),
        (("gone",), "'gone' is not in the registry"),
    ],
)
def test_what_cannot_be_compressed(root: Path, coe_home: Path, arguments: tuple[str, ...], message: str) -> None:
    error = failure(*arguments)
    assert isinstance(error, ConfigError | RegistryError) and message in str(error)
    unchanged(coe_home)


def test_a_base_that_the_expert_does_not_come_from_is_named(root: Path, coe_home: Path) -> None:
    other = Path(shutil.copytree("base", "other"))
    weights = load_file(other / "model.safetensors")
    save_file({f"other.{name}": tensor for name, tensor in weights.items()}, other / "model.safetensors")
    with Path("experts.yaml").open("a") as file:
        file.write("  - {name: other, kind: model, source: other}\n")
    run("apply", "experts.yaml")
    error = failure("tuned", "--base", "other")
    assert isinstance(error, ConfigError) and "tuned@1, which was not fine-tuned from it: nothing was" in str(error)


def test_a_registry_in_memory_keeps_no_version(root: Path) -> None:
    message = str(failure("small", "-c", "files.yaml"))
    assert "replace `experts` by `registry: null`" in message and "--out" not in message


@pytest.mark.parametrize("flag", [("--density", "0"), ("--density", "101"), ("--alpha", "x"), ("--method", "zip")])
def test_wrong_flags(root: Path, flag: tuple[str, str]) -> None:
    assert flag[0] in run("compress", "tuned", *flag, status=2).stderr


def test_compression_names_its_method() -> None:
    assert [Compression().method, Compression(0.1).method] == ["exact", "compeft"]
