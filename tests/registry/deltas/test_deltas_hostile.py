"""Damaged and hostile deltas: a clear error, never another model and never memory without bound."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from delta_files import adapter_folder, compressed, model_folder, restored_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from registry.deltas.manifest import MANIFEST, PAYLOAD, TENSORS, read_delta
from registry.deltas.planes import encode_planes
from registry.deltas.restoring import OpenDelta
from registry.errors import SourceError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    base = model_folder(root / "base", {"w": torch.randn(6, 5), "v": torch.randn(9).half()})
    expert = model_folder(root / "expert", {"w": torch.randn(6, 5), "v": torch.randn(9).half(), "new": torch.ones(4)})
    compressed(expert, base, root / "exact")
    compressed(expert, base, root / "compeft", density=0.3)
    adapter = adapter_folder(root / "adapter", {"q": (torch.randn(4, 8), torch.randn(6, 4))})
    compressed(adapter, None, root / "lora", density=0.3)
    return root


def copy_of(delta: Path, out: Path) -> Path:
    out.mkdir(parents=True)
    for file in delta.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["exact", "compeft", "lora"]), st.sampled_from([MANIFEST, PAYLOAD]), st.data())
def test_any_damage_is_an_error_or_changes_nothing(
    made: Path, tmp_path_factory: pytest.TempPathFactory, which: str, name: str, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("damaged")
    delta = copy_of(made / which, root / "delta")
    content = bytearray((delta / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "overwrite"]))
    if kind == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[at:]
    else:
        content[at : at + 8] = data.draw(st.binary(min_size=1, max_size=8))
    (delta / name).write_bytes(content)
    base = None if which == "lora" else made / "base"
    try:
        found = restored_in(delta, base, root / "again")
    except SourceError:
        return
    whole = restored_in(made / which, base, root / "whole")
    for file in whole.iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes()


def edited(made: Path, out: Path, which: str = "exact", **changes: Any) -> Path:
    delta = copy_of(made / which, out)
    manifest = json.loads((delta / MANIFEST).read_text())
    (delta / MANIFEST).write_text(json.dumps(manifest | changes))
    return delta


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has the format 2; this version of coe reads format 1: update coe"),
        ({"files": []}, "files: Tuple should have at least 1 item"),
        ({"density": 7}, "density: Input should be less than or equal to 1"),
        ({"more": 1}, "more: Extra inputs"),
        ({"base": None}, "has differences from a base, but no digest of it"),
        ({"tensors": [["xor", 0.0]]}, "have different tensors"),
        ({"tensors": [["added", float("inf")]] * 3}, "damaged"),
    ],
)
def test_a_manifest_that_contradicts_itself(made: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        OpenDelta.open(edited(made, tmp_path / "delta", **changes))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "x.bin", ""])
def test_restored_files_stay_in_their_folder(made: Path, tmp_path: Path, name: str) -> None:
    stated = read_delta(made / "exact").files[0].model_dump()
    with pytest.raises(SourceError, match="files.0.name"):
        read_delta(edited(made, tmp_path / "delta", files=[stated | {"name": name}]))


def with_header(made: Path, out: Path, entries: dict[str, Any]) -> Path:
    """A delta whose restored file has this header."""
    header = json.dumps(entries).encode()
    size = 8 + len(header) + max(entry["data_offsets"][1] for entry in entries.values())
    stated = read_delta(made / "exact").files[0].model_dump() | {"size_bytes": size, "header_bytes": len(header)}
    delta = edited(made, out, files=[stated], tensors=[["whole", 0.0]] * len(entries), base=None)
    parts = load_file(delta / PAYLOAD)
    parts["header/model.safetensors"] = np.frombuffer(encode_planes(np.frombuffer(header, np.uint8), 1), np.uint8)
    save_file(parts, delta / PAYLOAD)
    return delta


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2**44], "data_offsets": [0, 2**46]}, "do not fill it|damaged"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}, "place and size of w do not fit"),
        ({"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}, "place and size of w do not fit"),
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}, "a shape is too large"),
        ({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}, "sizes are whole numbers"),
        ({"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}, "of type F4, which deltas do not hold"),
    ],
)
def test_headers_that_state_too_much(made: Path, tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        OpenDelta.open(with_header(made, tmp_path / "delta", {"w": entry}))


def test_a_chunk_of_another_size_than_stated(made: Path, tmp_path: Path) -> None:
    delta = with_header(made, tmp_path / "delta", {"w": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}})
    parts = load_file(delta / PAYLOAD)
    bomb = encode_planes(np.zeros(2**24, np.uint8), 1)
    parts[TENSORS] = np.frombuffer(len(bomb).to_bytes(4, "little") + bomb, np.uint8)
    save_file(parts, delta / PAYLOAD)
    with pytest.raises(SourceError, match="compressed weights are damaged"):
        restored_in(delta, None, tmp_path / "again")


def test_a_delta_without_its_weights(made: Path, tmp_path: Path) -> None:
    delta = copy_of(made / "exact", tmp_path / "delta")
    (delta / PAYLOAD).unlink()
    with pytest.raises(SourceError, match="delta.safetensors is missing"):
        restored_in(delta, made / "base", tmp_path / "again")
