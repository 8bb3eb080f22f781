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


def as_hub_cache(service: Path, coe_home: Path) -> Path:
    """Store the GGUF file as the Hugging Face hub caches it: links to a file that is named by its hash."""
    root = service.parent
    (root / "snapshots" / "1").mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "tiny.gguf").replace(root / "blobs" / "0c1d")
    (root / "snapshots" / "1" / "tiny.gguf").symlink_to("../../blobs/0c1d")
    (root / "TINY.GGUF").symlink_to("blobs/0c1d")
    coe_home.mkdir(exist_ok=True)
    (coe_home / "t.Gguf").symlink_to(root / "TINY.GGUF")
    return root


@pytest.mark.parametrize("source", ["snapshots/1/tiny.gguf", "TINY.GGUF", "snapshots/1", "blobs/0c1d", "home://t.Gguf"])
async def test_it_answers_from_the_hub_cache_whatever_the_name(service: Path, coe_home: Path, source: str) -> None:
    root = as_hub_cache(service, coe_home)
    experts = root / "experts.yaml"
    experts.write_text(experts.read_text().replace("source: tiny.gguf", f"source: {source}"))
    spec = open_snapshot(load_config(service)).get("tiny")
    assert spec.source == (source if "://" in source else str(root / source))
    async with open_local(service) as system:
        reply = system.answer(GenerateRequest(prompt="a", max_tokens=3))
        await reply.text()
        assert reply.answer is not None and 1 <= reply.answer.usage.completion_tokens <= 3
    [folder] = (coe_home / "converted").iterdir()
    assert locate(spec) == folder


def test_a_file_that_was_altered_after_registration_is_refused(service: Path) -> None:
    spec = open_snapshot(load_config(service)).get("tiny")
    file = service.parent / "tiny.gguf"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DigestMismatch, match=r"tiny\.gguf differs"):
        locate(spec)
