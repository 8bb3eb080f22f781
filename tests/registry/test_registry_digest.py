from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from model_files import write_gguf, write_model

from registry import digest
from registry.digest import check_files, digest_files, digest_of, digest_of_text, hash_files
from registry.errors import DigestMismatch, SourceError
from registry.spec import ExpertSpec, Kind
from registry.storage import sha256_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were actually read."""
    read: list[str] = []

    def counting(path: Path, on_bytes: object = None) -> str:
        read.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(digest, "sha256_file", counting)
    return read


def registered(path: Path) -> ExpertSpec:
    files = hash_files(path)
    return ExpertSpec(name="m", kind=Kind.MODEL, source=str(path), files=files, digest=digest_of(files), version=2)


def age(folder: Path, seconds: float = 60) -> None:
    for file in folder.iterdir():
        os.utime(file, (time.time() - seconds, time.time() - seconds))


def names(path: Path) -> list[str]:
    return [record.name for record in hash_files(path)]


def test_the_digest_covers_what_changes_answers_and_nothing_else(folder: Path) -> None:
    before = digest_of(hash_files(folder))
    for name in ("README.md", "training_log.json", ".model.safetensors.part-1", "optimizer.pt"):
        (folder / name).touch()
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").touch()
    assert digest_of(hash_files(folder)) == before
    assert names(folder) == ["config.json", "model.safetensors", "tokenizer.json"]
    for name in ("chat_template.jinja", "generation_config.json", "model-2.safetensors", "adapter_config.json"):
        (folder / name).touch()
        changed = digest_of(hash_files(folder))
        assert changed != before and changed.startswith("sha256:") and len(changed) == 71
        before = changed


def test_templates_and_modules_in_subfolders_count(folder: Path) -> None:
    for name in ("additional_chat_templates/tool.jinja", "1_Pooling/config.json", "2_Dense/model.safetensors"):
        (folder / name).parent.mkdir()
        (folder / name).touch()
        assert name in names(folder)


def test_names_belong_to_the_digest(folder: Path) -> None:
    before = digest_of(hash_files(folder))
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    assert digest_of(hash_files(folder)) != before


def test_the_digest_does_not_depend_on_the_place(folder: Path, tmp_path: Path) -> None:
    assert digest_of(hash_files(write_model(tmp_path / "elsewhere"))) == digest_of(hash_files(folder))
    assert digest_of_text("a", "bc") != digest_of_text("ab", "c")


def test_a_gguf_is_one_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    (record,) = hash_files(path)
    assert (record.name, record.size_bytes) == ("m.gguf", path.stat().st_size)
    assert digest_files(path) == [path]
    check_files(registered(path), path)


def test_unchanged_files_pass_and_are_read_once(
    folder: Path, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "_SETTLED_NS", -1)
    spec = registered(folder)
    assert len(readings) == 3
    check_files(spec, folder)
    assert len(readings) == 3
    check_files(spec, folder, fresh=True)
    assert len(readings) == 6


def test_a_file_changed_a_moment_ago_is_not_remembered(folder: Path, readings: list[str], coe_home: Path) -> None:
    registered(folder)
    assert not (coe_home / "hashes").exists()
    check_files(registered(folder), folder)
    assert len(readings) == 9


def test_an_alteration_that_keeps_size_and_time_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_SETTLED_NS", -1)
    age(folder)
    spec = registered(folder)
    path = folder / "model.safetensors"
    content, stat = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    time.sleep(0.02)  # the file system's clock ticks every few milliseconds
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for fresh in (False, True):
        with pytest.raises(DigestMismatch, match=r"files of m@2 .*: model\.safetensors differs\. Restore"):
            check_files(spec, folder, fresh=fresh)


@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"key": 1}', b"{"])
def test_a_damaged_memory_is_mended(
    folder: Path, coe_home: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    monkeypatch.setattr(digest, "_SETTLED_NS", -1)
    spec = registered(folder)
    for memory in (coe_home / "hashes").iterdir():
        memory.write_bytes(damage)
    check_files(spec, folder)


def test_every_difference_is_named(folder: Path) -> None:
    spec = registered(folder)
    (folder / "config.json").unlink()
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-4])
    (folder / "tokenizer.json").write_text('{"model": []}')
    (folder / "chat_template.jinja").touch()
    with pytest.raises(DigestMismatch) as caught:
        check_files(spec, folder)
    assert (
        f"config.json is missing; model.safetensors is truncated ({size - 4:,} bytes of {size:,}); "
        "tokenizer.json differs; chat_template.jinja is new"
    ) in str(caught.value)


def test_files_that_are_gone_or_unreadable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = registered(folder)
    with pytest.raises(SourceError, match="the files of m@2 are missing"):
        check_files(spec, folder / "absent")

    def fail(path: Path, on_bytes: object = None) -> str:
        raise PermissionError("denied")

    monkeypatch.setattr(digest, "sha256_file", fail)
    with pytest.raises(SourceError, match="cannot be read: denied"):
        check_files(spec, folder)


def test_progress_is_told(folder: Path) -> None:
    spec, told = registered(folder), []
    check_files(spec, folder, fresh=True, on_bytes=told.append)
    assert sum(told) == sum(record.size_bytes for record in spec.files)


def test_remembered_bytes_count_as_progress(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_SETTLED_NS", -1)
    told: list[list[int]] = [[], []]
    for steps in told:
        hash_files(folder, on_bytes=steps.append)
    assert sum(told[0]) == sum(told[1]) == sum(record.size_bytes for record in hash_files(folder))


def test_a_home_that_cannot_be_written_only_costs_time(
    folder: Path, coe_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "_SETTLED_NS", -1)
    coe_home.write_text("not a folder")
    check_files(registered(folder), folder)
