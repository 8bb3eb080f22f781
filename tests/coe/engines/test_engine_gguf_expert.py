"""An expert registered as a GGUF file: checked, converted once, and called like any other."""

from pathlib import Path

import pytest
from test_engine_convert import write_gguf

from coe.config import load_config
from coe.experts import locate, open_snapshot
from coe.local import open_local
from coe.types import GenerateRequest
from registry.errors import DigestMismatch


@pytest.fixture
def service(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "experts.yaml").write_text("experts:\n  - {name: tiny, kind: model, source: tiny.gguf}\n")
    path = tmp_path / "service.yaml"
    path.write_text("experts: [experts.yaml]\nhost: {budget: 64MiB}\npolicies: {default: {expert: tiny}}\n")
    return path


async def test_it_answers_from_weights_that_are_converted_once(service: Path, coe_home: Path) -> None:
    texts = []
    for _ in range(2):
        async with open_local(service) as system:
            reply = system.answer(GenerateRequest(prompt="a", max_tokens=3))
            texts.append(await reply.text())
            assert reply.answer is not None and 1 <= reply.answer.usage.completion_tokens <= 3
    assert texts[0] == texts[1]
    [folder] = (coe_home / "converted").iterdir()
    assert (folder / "model.safetensors").is_file()


def test_a_file_that_was_altered_after_registration_is_refused(service: Path) -> None:
    spec = open_snapshot(load_config(service)).get("tiny")
    file = service.parent / "tiny.gguf"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DigestMismatch, match=r"tiny\.gguf differs"):
        locate(spec)
