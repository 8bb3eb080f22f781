"""Loading a causal model for `hf`: device, dtype, memory check, and safe reading of its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, Final

from coe.engines.hf.private_weights import private_weights
from coe.engines.hf.tokenizers import read_tokenizer
from coe.errors import CoeError, ConfigError, EngineError, OutOfMemory, WeightsError

if TYPE_CHECKING:
    import torch

_DTYPES: Final = ("bfloat16", "float16", "float32")
_LOW_MEMORY_TEXTS: Final = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, with its tokenizer and limits.

    Attributes:
        model: a transformers causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        eos: token ids that end an answer, from the generation config, the config and the tokenizer.
        context_length: tokens of prompt and answer together.
        cache_bytes_per_token: bytes of one token of one row in the key-value cache.
    """

    model: Any
    tokenizer: Any
    eos: frozenset[int]
    context_length: int
    cache_bytes_per_token: int


def choose_device(device: str) -> str:
    """`auto` is CUDA, else Apple's MPS, else the CPU; any other value is a torch device.

    Raises:
        ConfigError: this machine has no such device.
    """
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there.get(device.partition(":")[0], False):
        usable = ", ".join(name for name, is_there in there.items() if is_there)
        raise ConfigError(f"device {device!r} is not available; this machine has: {usable} ('auto' chooses)")
    return device


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 if the hardware supports it, else float16 on an accelerator and float32 on a CPU.

    Raises:
        ConfigError: no such dtype.
    """
    import torch

    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not supported; there are: auto, {', '.join(_DTYPES)}")
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device == "mps":
        return torch.bfloat16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def free_bytes(device: str) -> int:
    """Free bytes of a device; Apple's accelerators share the host's memory."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # type: ignore[import-untyped]  # has no stubs of its own

    return int(psutil.virtual_memory().available)


def require_memory(name: str, needed: int, device: str, free: Callable[[str], int] = free_bytes) -> None:
    """Raises OutOfMemory if the device has less than `needed` bytes free."""
    available = free(device)
    if needed > available:
        raise OutOfMemory(
            f"{name!r} needs {needed / 2**20:.0f} MiB on {device} and {available / 2**20:.0f} MiB are free: "
            "stop other programs, or choose a smaller expert"
        )


def weight_bytes(path: Path, dtype: torch.dtype) -> int:
    """Bytes of the weights of a folder once loaded; its files hold at least two bytes a weight."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors")) * dtype.itemsize // 2


def load_model(
    name: str,
    path: Path,
    device: str,
    dtype: torch.dtype,
    tokenizer_of: Callable[[Path], Any] = read_tokenizer,
) -> LoadedModel:
    """Load a folder in the Hugging Face layout: local files, safetensors, no code from the folder.

    Args:
        tokenizer_of: the tokenizer in a folder.

    Raises:
        WeightsError: files missing, truncated, of other shapes or of an unsupported architecture.
        OutOfMemory: memory ran out while loading.
    """
    if not (path / "config.json").is_file():
        raise WeightsError(f"{name!r}: {path} has no config.json, so it is not the folder of a model")
    if (path / "adapter_config.json").exists():
        raise WeightsError(f"{name!r}: {path} holds an adapter: register it with kind 'adapter' and its base")
    try:
        with translate(f"{name!r} cannot be loaded from {path}", WeightsError):
            return _load(name, path, device, dtype, tokenizer_of)
    except WeightsError as error:
        error.public = error.public or f"expert {name!r} cannot be loaded: its files are damaged or not supported"
        raise


def _load(name: str, path: Path, device: str, dtype: torch.dtype, tokenizer_of: Callable[[Path], Any]) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with private_weights():
        config = AutoConfig.from_pretrained(path, **local)
        if "/" in str(getattr(config, "_attn_implementation", "")):
            raise WeightsError(f"{name!r}: config.json asks for attention code from a repository, which is never run")
        tokenizer = tokenizer_of(path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            device_map=None if device == "cpu" else {"": device},
            **local,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise WeightsError(f"{name!r}: {path} lacks {len(missing)} of the model's weights, such as {missing[0]}")
    model.eval().requires_grad_(False)
    copy_before_head(model)
    return describe(model, tokenizer)


def describe_files(model: Any, path: Path, tokenizer: Any) -> LoadedModel:
    """A model that has taken the weights of the folder in place, with the folder's tokenizer and end tokens.

    Raises what transformers does if the generation config cannot be read.
    """
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    else:
        model.generation_config = GenerationConfig.from_model_config(model.config)
    return describe(model, tokenizer)


def copy_before_head(model: Any) -> None:
    """Give the head a contiguous copy of the last position's hidden states, which are a strided slice.

    torch on a CPU multiplies a slice with the head hundreds of times slower in bfloat16 than a copy
    (`benchmarks/head_slice.py`).
    """
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


def describe(model: Any, tokenizer: Any) -> LoadedModel:
    """A loaded model with its limits; its generation config loses all but the end tokens that are kept here."""
    text = model.config.get_text_config()
    eos = _ids(model.generation_config.eos_token_id) | _ids(text.eos_token_id) | _ids(tokenizer.eos_token_id)
    # Sampling defaults of a repository must not change what a request specifies.
    model.generation_config = type(model.generation_config)()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        eos=eos,
        context_length=int(getattr(text, "max_position_embeddings", None) or tokenizer.model_max_length),
        cache_bytes_per_token=2 * text.num_hidden_layers * heads * head_dim * model.dtype.itemsize,
    )


def _ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value if isinstance(value, list) else [value])


@contextmanager
def translate(what: str, error_class: type[EngineError]) -> Iterator[None]:
    """Raise `error_class`, or OutOfMemory if memory ran out, for errors of torch, transformers and safetensors."""
    try:
        yield
    except CoeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            clear_frames(error.__traceback__)  # they hold the tensors that did not fit
            raise OutOfMemory(f"{what}: memory ran out ({error})") from error
        raise error_class(f"{what}: {type(error).__name__}: {error}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; on a CPU, torch reports that only in the text of a RuntimeError."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(t in str(error).lower() for t in _LOW_MEMORY_TEXTS)
