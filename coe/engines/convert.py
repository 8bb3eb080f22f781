"""GGUF -> a folder of bf16 safetensors with tokenizer, chat template and generation config, which every engine loads.

transformers unpacks the weights. The registry reads headers with its own reader (`registry/gguf_header.py`): that of
the gguf package takes 20 s for a large vocabulary and trusts stated lengths.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from coe.errors import WeightsError
from registry.storage import atomic_directory, require_free, sha256_file

MARKER: Final = "conversion.json"
_FORMAT: Final = 1
_BYTES_PER_WEIGHT: Final = 2  # bf16
_TOKENIZER_BYTES: Final = 64 * 2**20  # a generous bound for tokenizer.json and the small files

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Header:
    """Facts of a GGUF file, read before its weights."""

    architecture: str
    n_weights: int
    add_bos: bool


def convert_gguf(gguf: Path, out: Path, *, chat_template: str | None = None, progress: Progress | None = None) -> Path:
    """Convert a GGUF file, once, into the folder `out` of bf16 safetensors, and return `out`.

    A complete folder has a marker with the SHA-256 of its source file, and is returned unchanged if that still matches.
    The folder appears complete or not at all.

    Args:
        gguf: the quantised or plain GGUF file.
        out: the folder to write; must not exist, or be an earlier conversion.
        chat_template: Jinja source of a template for a file without one, such as a base model.
        progress: called with one line per stage.

    Raises:
        WeightsError: the file is missing, truncated, not GGUF, or of an unsupported architecture; or `out`
            contains something else.
        registry.errors.DiskFull: not enough free disk space; nothing is written.
    """
    report = progress or (lambda _: None)
    if not gguf.is_file():
        raise WeightsError(f"{gguf} is not a file: give the path of a GGUF file")
    digest = sha256_file(gguf)
    if is_converted(out, source_sha256=digest):
        return out
    if out.exists() and not (out / MARKER).is_file():
        raise WeightsError(f"{out} exists and is not a conversion of a GGUF file: remove it or choose another folder")
    report(f"reading the header of {gguf.name}")
    header = _read_header(gguf)
    require_free(out, header.n_weights * _BYTES_PER_WEIGHT + _TOKENIZER_BYTES)
    with atomic_directory(out) as folder:
        report(f"unpacking {header.n_weights / 1e6:.0f} M weights of {gguf.name}")
        _convert_into(gguf, folder, add_bos=header.add_bos, chat_template=chat_template)
        _write_marker(folder, gguf.name, digest, header.architecture)
    report(f"wrote {out}")
    return out


def is_converted(out: Path, *, source_sha256: str) -> bool:
    """Whether `out` is a complete conversion of the GGUF file with that SHA-256: all files, with the sizes written."""
    try:
        marker = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    if marker.get("format") != _FORMAT or marker.get("source_sha256") != source_sha256:
        return False
    return all((out / name).is_file() and (out / name).stat().st_size == n for name, n in marker["files"].items())


def supported_architectures() -> tuple[str, ...]:
    """GGUF architectures that can be converted, by their GGUF names."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return tuple(sorted(GGUF_SUPPORTED_ARCHITECTURES))


def _read_header(gguf: Path) -> _Header:
    """Read metadata and tensor table; the reader maps every tensor, which detects truncated files."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
        architecture = _field(reader, "general.architecture", "")
        n_weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError) as error:
        size = gguf.stat().st_size
        raise WeightsError(
            f"{gguf} ({size} bytes) is not a complete GGUF file, perhaps truncated: {error}; download it again"
        ) from error
    if architecture not in supported_architectures():
        raise WeightsError(
            f"{gguf} has the architecture {architecture!r}, which cannot be converted; supported are "
            f"{', '.join(supported_architectures())}"
        )
    return _Header(architecture, n_weights, add_bos=bool(_field(reader, "tokenizer.ggml.add_bos_token", False)))


def _field(reader: Any, name: str, default: Any) -> Any:
    field = reader.get_field(name)
    return default if field is None else field.contents()


def _convert_into(gguf: Path, folder: Path, *, add_bos: bool, chat_template: str | None) -> None:
    """Unpack the weights as bf16 and save them with the tokenizer of the file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    from coe.engines.hf.load import translate
    from routers.encoders.loading import model_loading, quiet_progress

    with translate(f"{gguf} cannot be converted", WeightsError):
        with model_loading(), _quiet_unpacking():
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(gguf.parent),
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                local_files_only=True,
            )
        tokenizer: Any = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, local_files_only=True)
    _forget_quantisation(model)
    if add_bos:
        _prefix_bos(tokenizer)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = chat_template
    with quiet_progress():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _quiet_unpacking() -> Iterator[None]:
    """No bar while transformers unpacks GGUF tensors; that bar ignores the setting of all its others."""
    from transformers import modeling_gguf_pytorch_utils

    module: Any = modeling_gguf_pytorch_utils
    bar, module.tqdm = module.tqdm, partial(module.tqdm, disable=True)
    try:
        yield
    finally:
        module.tqdm = bar


def _forget_quantisation(model: Any) -> None:
    """Dense weights of a GGUF model still call themselves quantised, which save_pretrained refuses."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""  # else the folder's name, and with it the digest, depends on where it was made
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None


def _prefix_bos(tokenizer: Any) -> None:
    """Have the tokenizer begin raw text with <bos>, as the file asks; transformers drops that rule when it reads GGUF.

    A chat template renders its own and is encoded without special tokens, so that there is exactly one either way.
    """
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )


def _write_marker(folder: Path, source: str, source_sha256: str, architecture: str) -> None:
    """The marker is written last, from what is on disk."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    marker = {
        "format": _FORMAT,
        "source": source,
        "source_sha256": source_sha256,
        "architecture": architecture,
        "files": files,
    }
    (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
