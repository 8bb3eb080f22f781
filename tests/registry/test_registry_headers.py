from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from model_files import PARAMETERS, llama_tensors, write_gguf, write_json, write_model, write_sharded
from safetensors.numpy import save_file

from registry.errors import SourceError
from registry.gguf_header import SUPPORTED_ARCHITECTURES, read_gguf
from registry.headers import read_adapter_weights, read_json, read_safetensors, read_weights

SHAPES = {name: tensor.shape for name, tensor in llama_tensors().items()}


def raw_safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_shapes_come_from_the_header(tmp_path: Path) -> None:
    tensors = read_safetensors(write_model(tmp_path) / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == SHAPES
    assert sum(tensor.elements for tensor in tensors.values()) == PARAMETERS
    assert sum(tensor.n_bytes for tensor in tensors.values()) == 4 * PARAMETERS


def test_metadata_and_scalars(tmp_path: Path) -> None:
    save_file({"x": np.array(1, np.float32)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert read_safetensors(tmp_path / "x.safetensors")["x"].elements == 1
    save_file({}, tmp_path / "none.safetensors")
    assert read_safetensors(tmp_path / "none.safetensors") == {}


@pytest.mark.parametrize("keep", [0, 4, 20, -1, -100])
def test_truncation_is_told_with_both_sizes(tmp_path: Path, keep: int) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    size = f"{len(whole[:keep]):,} bytes"
    with pytest.raises(
        SourceError, match=f"{path} is truncated.*: {size}" + (f" of {len(whole):,}" if keep < 0 else "")
    ):
        read_safetensors(path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        [],
        {"x": 1},
        {"x": {"dtype": "F32", "shape": [1]}},
        {"x": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "Z9", "shape": [1], "data_offsets": [0, 4]}},
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, header: Any) -> None:
    path = raw_safetensors(tmp_path / "x.safetensors", header, b"\0" * 4)
    with pytest.raises(SourceError, match=f"{path} is"):
        read_safetensors(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"x.safetensors is missing in {tmp_path}"):
        read_safetensors(tmp_path / "x.safetensors")


def test_shards_are_read_as_one_model(tmp_path: Path) -> None:
    tensors, files = read_weights(write_sharded(tmp_path))
    assert {name: tensor.shape for name, tensor in tensors.items()} == SHAPES and len(files) == len(SHAPES)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(SourceError, match=r"lacks 1 of 5 shards: model-1\.safetensors"):
        read_weights(tmp_path)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    shard = write_sharded(tmp_path) / "model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(SourceError, match=r"model-2\.safetensors is truncated"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": []}, {"weight_map": {"x": "../x.safetensors"}}, {"weight_map": {"x": "x.bin"}}]
)
def test_a_bad_index_is_refused(tmp_path: Path, index: Any) -> None:
    write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(SourceError, match="has no weight_map of file names"):
        read_weights(tmp_path)


def test_tensors_that_no_shard_has_are_named(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"lost": "model-0.safetensors"}})
    with pytest.raises(SourceError, match="'lost'"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("pytorch_model.bin", "pickled weights only; pickles can run any code and are never loaded"),
        ("model.gguf", "set the source to .*model.gguf"),
        ("README.md", r"has no model.safetensors \(it has README.md\)"),
        (None, "it has no files"),
    ],
)
def test_folders_without_safetensors_say_what_to_do(tmp_path: Path, found: str | None, message: str) -> None:
    if found:
        (tmp_path / found).touch()
    with pytest.raises(SourceError, match=message):
        read_weights(tmp_path)


def test_places_that_are_no_folders(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no folder"):
        read_weights(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="is not a folder"):
        read_adapter_weights(tmp_path / "file")


def test_pickled_adapters_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(
        SourceError, match=r"never loaded: download or convert the weights to safetensors \(adapter_model"
    ):
        read_adapter_weights(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "has no x.json"), ("{", "cannot be read as"), ("[]", "not a JSON ob")]
)
def test_json_files(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(SourceError, match=message):
        read_json(tmp_path / "x.json")


def test_gguf_agrees_with_the_format_s_own_reader(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", experts=(4, 2))
    header, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert {name: (t.shape, t.n_bytes) for name, t in header.tensors.items()} == {
        t.name: (tuple(reversed(t.shape.tolist())), t.n_bytes) for t in theirs.tensors
    }
    for name, value in header.fields.items():
        assert theirs.fields[name].contents() == value
    assert header.architecture == "llama" and header.of_architecture("expert_count") == 4
    assert header.of_architecture("absent") is None and header.fields["test.flag"] is True


def test_every_truncation_of_a_gguf_is_noticed(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for length in (0, 3, 20, 40, 100, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(SourceError, match=f"{path} is damaged or not GGUF"):
            read_gguf(path)


@pytest.mark.parametrize(
    ("offset", "patch", "message"),
    [
        (0, b"GGML", "does not start with 'GGUF'"),
        (4, struct.pack(">I", 3), "version .* is not supported"),
        (16, struct.pack("<Q", 2**60), "bytes are stated at"),
        (24, struct.pack("<Q", 2**63), "bytes are stated at"),
    ],
)
def test_corrupt_ggufs_are_refused_without_trusting_them(
    tmp_path: Path, offset: int, patch: bytes, message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    content[offset : offset + len(patch)] = patch
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_gguf(path)


def raw_gguf(path: Path, fields: list[tuple[str, int, bytes]], tensors: bytes = b"", count: int = 0) -> Path:
    body = b""
    for name, kind, value in fields:
        body += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, count, len(fields)) + body + tensors)
    return path


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ([("a", 99, b"")], b"", "unknown type 99"),
        ([("a", 8, struct.pack("<Q", 1) + b"\xff")], b"", "utf-8"),
        ([("a", 9, struct.pack("<IQ", 99, 1))], b"", "unknown type 99"),
        ([("general.alignment", 4, struct.pack("<I", 0))], b"", "alignment 0"),
        ([], struct.pack("<Q", 1) + b"t" + struct.pack("<I", 9), "'t' has 9 dimensions"),
        ([], struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 4, 999, 0), "999 is not a valid"),
    ],
)
def test_nonsense_in_a_gguf(tmp_path: Path, fields: list[Any], tensors: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read_gguf(raw_gguf(tmp_path / "m.gguf", fields, tensors, count=int(bool(tensors))))


def test_unsupported_architectures_are_named_with_the_supported_ones(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"of architecture 'rwkv7', which transformers cannot load.*llama"):
        read_gguf(write_gguf(tmp_path / "m.gguf", "rwkv7"))
    with pytest.raises(SourceError, match="of architecture ''"):
        read_gguf(raw_gguf(tmp_path / "none.gguf", []))


def test_parts_of_a_split_gguf_are_not_taken_for_the_whole(tmp_path: Path) -> None:
    path = raw_gguf(tmp_path / "m-00001-of-00003.gguf", [("split.count", 2, struct.pack("<H", 3))])
    with pytest.raises(SourceError, match="is one part of a split GGUF: merge the parts first"):
        read_gguf(path)


def test_missing_gguf(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        read_gguf(tmp_path / "m.gguf")


def test_the_architectures_are_those_of_transformers() -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    # model types of transformers whose name in GGUF files differs
    renamed = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2"}
    ours = {renamed.get(name, name) for name in SUPPORTED_ARCHITECTURES}
    not_models = {"general", "tokenizer"}
    assert ours - {"t5encoder"} == set(GGUF_SUPPORTED_ARCHITECTURES) - not_models - {"umt5"}  # umt5 files say t5


def test_pipes_and_folders_are_refused_without_opening_them(tmp_path: Path) -> None:
    for name in ("pipe.gguf", "model.safetensors", "config.json"):
        os.mkfifo(tmp_path / name)
    for read, name in ((read_gguf, "pipe.gguf"), (read_safetensors, "model.safetensors"), (read_json, "config.json")):
        with pytest.raises(SourceError, match=f"{name} is a pipe, socket or device, not a file"):
            read(tmp_path / name)
        with pytest.raises(SourceError, match="is a folder, not a file"):
            read(tmp_path)
    with pytest.raises(SourceError, match="is a pipe, socket or device"):
        read_weights(tmp_path)


def test_deeply_nested_headers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(SourceError, match="cannot be read as JSON"):
        read_json(tmp_path / "config.json")
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)
    with pytest.raises(SourceError, match="is not a safetensors file"):
        read_safetensors(path)
    nested = struct.pack("<IQ", 9, 1) * 20_000 + struct.pack("<IQ", 0, 0)
    with pytest.raises(SourceError, match="arrays are nested more than 4 levels deep"):
        read_gguf(raw_gguf(tmp_path / "m.gguf", [("a", 9, nested)]))


def gguf_tensor(name: str, elements: int, offset: int) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<IQIQ", 1, elements, 0, offset)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (struct.pack("<IQQ", 3, 2**60, 0), "bytes are stated at"),
        (struct.pack("<IQQ", 3, 100_001, 0), "100,001 tensors; the most is 100,000"),
        (struct.pack("<IQQ", 3, 0, 10_001), "10,001 fields; the most is 10,000"),
        (struct.pack("<IQQQ", 3, 0, 1, 2**24 + 1), "a string of 16,777,217 bytes; the most is 16,777,216"),
    ],
)
def test_counts_of_a_gguf_are_bounded(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + header)
        file.truncate(2**30)  # a sparse file: every length that it states is inside it
    with pytest.raises(SourceError, match=message):
        read_gguf(path)


def test_the_values_of_a_gguf_header_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.gguf_header._MAX_READS", 1000)
    path = raw_gguf(tmp_path / "m.gguf", [("a", 9, struct.pack("<IQ", 8, 2**20))], bytes(2**24))
    with pytest.raises(SourceError, match="the header has more than 1,000 values"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (gguf_tensor("b", 8, 16), "the tensors 'a' and 'b' overlap"),
        (gguf_tensor("b", 8, 0), "the tensors 'a' and 'b' overlap"),
        (gguf_tensor("a", 8, 32), "two tensors have the same name"),
    ],
)
def test_tensors_of_a_gguf_are_separate(tmp_path: Path, second: bytes, message: str) -> None:
    tensors = gguf_tensor("a", 8, 0) + second + bytes(256)
    with pytest.raises(SourceError, match=message):
        read_gguf(raw_gguf(tmp_path / "m.gguf", [], tensors, count=2))


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}',
        '{"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}',
        '{"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}',
        '{"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}',
        '{"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}',
        '{"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}',
        '{"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}',
        '{"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}',
        '{"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}',
        '{"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}',
        '{"dtype": "F32", "shape": [18446744073709551616], "data_offsets": [0, 4]}',
        '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "same bytes": '
        '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}',
    ],
)
def test_impossible_tensors_are_one_line(tmp_path: Path, entry: str) -> None:
    path = raw_safetensors(tmp_path / "x.safetensors", f'{{"x": {entry}}}'.encode(), bytes(8))
    with pytest.raises(SourceError) as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_json_file_of_more_bytes_than_the_bound_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": "12345678901"}')
    assert read_json(tmp_path / "config.json", most_bytes=20) == {"a": "12345678901"}
    (tmp_path / "config.json").write_text('{"a": "123456789012"}')
    with pytest.raises(SourceError, match="has 21 bytes; the most is 20"):
        read_json(tmp_path / "config.json", most_bytes=20)
