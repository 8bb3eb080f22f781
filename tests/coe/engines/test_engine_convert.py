"""GGUF files, written here with the reference writer, turned into folders that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from coe.engines import convert
from coe.engines.convert import MARKER, convert_gguf, is_converted, supported_architectures
from coe.errors import WeightsError
from registry.errors import DiskFull
from registry.storage import sha256_file

VOCAB = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "Ġ"]
DIM, HIDDEN = 32, 64
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

# transformers and torch warn about their own internals while they read GGUF
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


def write_gguf(path: Path, *, architecture: str = "llama", add_bos: bool = True, template: Any = None) -> Path:
    """A llama of one layer with random weights and a byte-pair tokenizer of eight tokens."""
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(VOCAB))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(VOCAB)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(add_bos)
    if template is not None:
        writer.add_chat_template(template)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(VOCAB), DIM),
        "output_norm": (DIM,),
        "blk.0.attn_norm": (DIM,),
        "blk.0.ffn_norm": (DIM,),
        "blk.0.attn_q": (DIM, DIM),
        "blk.0.attn_k": (DIM // 2, DIM),
        "blk.0.attn_v": (DIM // 2, DIM),
        "blk.0.attn_output": (DIM, DIM),
        "blk.0.ffn_gate": (HIDDEN, DIM),
        "blk.0.ffn_up": (HIDDEN, DIM),
        "blk.0.ffn_down": (DIM, HIDDEN),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def test_the_folder_holds_the_weights_in_bf16_and_a_tokenizer(gguf: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said: list[str] = []
    out = convert_gguf(gguf, tmp_path / "models" / "tiny", chat_template=TEMPLATE, progress=said.append)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype is torch.bfloat16
    embedding = np.random.default_rng(0).normal(size=(len(VOCAB), DIM)).astype(np.float32)
    assert torch.equal(model.get_input_embeddings().weight, torch.from_numpy(embedding).bfloat16())
    assert not hasattr(model.config, "quantization_config")
    assert str(tmp_path) not in (out / "config.json").read_text()
    assert tokenizer("abc").input_ids == [1, 6, 5]  # exactly one <s>, then the merged pair
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"
    assert (out / "generation_config.json").is_file()
    assert said[-1] == f"wrote {out}"


def test_no_bar_of_a_library_is_shown(gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    convert_gguf(gguf, tmp_path / "model")
    shown = capfd.readouterr()
    assert "%|" not in shown.out + shown.err


def test_a_template_of_the_file_wins_and_no_bos_is_added_unasked(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    gguf = write_gguf(tmp_path / "tiny.gguf", add_bos=False, template="own")
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(gguf, tmp_path / "out", chat_template=TEMPLATE))
    assert tokenizer.chat_template == "own"
    assert tokenizer("abc").input_ids == [6, 5]


@pytest.mark.parametrize("default", [True, False])
def test_of_named_templates_in_the_file_the_default_is_kept(tmp_path: Path, default: bool) -> None:
    from transformers import AutoTokenizer

    named = [{"name": "rag", "template": "R"}, *([{"name": "default", "template": "D"}] if default else [])]
    gguf = write_gguf(tmp_path / "tiny.gguf", template=named)
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(gguf, tmp_path / "out", chat_template=TEMPLATE))
    assert tokenizer.chat_template == ("D" if default else TEMPLATE)


def test_a_finished_folder_is_not_written_again(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = convert_gguf(gguf, tmp_path / "out")
    assert is_converted(out, source_sha256=sha256_file(gguf))
    monkeypatch.setattr(convert, "_convert_into", lambda *_args, **_kwargs: pytest.fail("converted twice"))
    assert convert_gguf(gguf, out) == out


@pytest.mark.parametrize("damage", ["missing", "truncated", "no marker", "bad marker", "other source", "other format"])
def test_a_damaged_folder_is_never_taken_for_a_whole_one(gguf: Path, tmp_path: Path, damage: str) -> None:
    out = convert_gguf(gguf, tmp_path / "out")
    digest = sha256_file(gguf)
    weights, marker = out / "model.safetensors", out / MARKER
    match damage:
        case "missing":
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "no marker":
            marker.unlink()
        case "bad marker":
            marker.write_text("{")
        case "other source":
            digest = "0" * 64
        case "other format":
            marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": 0}))
    assert not is_converted(out, source_sha256=digest)


def test_a_truncated_conversion_is_made_again(gguf: Path, tmp_path: Path) -> None:
    out = convert_gguf(gguf, tmp_path / "out")
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[:100])
    convert_gguf(gguf, out)
    assert (out / "model.safetensors").read_bytes() == whole


def test_a_folder_of_something_else_is_left_alone(gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(WeightsError, match="is not a conversion of a GGUF file"):
        convert_gguf(gguf, out)
    assert (out / "thesis.txt").read_text() == "mine"


def test_an_unsupported_architecture_is_refused_with_the_list(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "tiny.gguf", architecture="rwkv6")
    with pytest.raises(WeightsError, match=r"'rwkv6'.*supported are .*llama") as error:
        convert_gguf(gguf, tmp_path / "out")
    assert all(name in str(error.value) for name in supported_architectures())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_truncated_file_is_refused(gguf: Path, tmp_path: Path, keep: int) -> None:
    gguf.write_bytes(gguf.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="not a complete GGUF file"):
        convert_gguf(gguf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_or_not_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not a file"):
        convert_gguf(tmp_path / "nowhere.gguf", tmp_path / "out")
    (tmp_path / "text.gguf").write_text("This is no model." * 10)
    with pytest.raises(WeightsError, match="not a complete GGUF file"):
        convert_gguf(tmp_path / "text.gguf", tmp_path / "out")


def test_weights_that_transformers_refuses_leave_nothing(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("tensor of an odd shape")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(WeightsError, match="odd shape"):
        convert_gguf(gguf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_too_little_disk_is_said_before_anything_is_written(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with pytest.raises(DiskFull):
        convert_gguf(gguf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(_gguf: Path, folder: Path, **_: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "_convert_into", fill_up)
    with pytest.raises(DiskFull):
        convert_gguf(gguf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
