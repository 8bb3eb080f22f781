"""The trained artifact of a run, as the zoo ships it: small, with a card, and without a trace of this machine."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import yaml

from coe.engines.latent.artifact import CARD, Artifact
from coe.errors import WeightsError
from examples.zoo.fetch import BASES
from examples.zoo.latent.benches import ALL_BENCHES, base_of
from examples.zoo.latent.methods import ABLATIONS, METHODS, Trains
from examples.zoo.latent.plan import Run
from examples.zoo.latent.results import Result, read_result
from examples.zoo.latent.shipped_card import about, card_of, licence_of
from examples.zoo.train import ZOO
from registry.composed import FILE, read_composed
from registry.storage import atomic_directory, atomic_path, coe_home

if TYPE_CHECKING:
    from torch import Tensor

SHIPPED: Final = ZOO / "latent_artifacts"
"""One folder for each artifact."""
EXPERTS: Final = "experts.yaml"
"""Lists the artifacts of the folder, for `coe registry apply` and services; written by `ship`."""
MOST_BYTES: Final = 8_000_000
_EXACT: Final = ("mean", "deviation")
"""Statistics of states: rounded, they would shift every state."""
_NAME: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_HEAD: Final = "# The trained compositions of this folder; written by `python -m examples.zoo.latent ship`.\n"


class CannotShip(Exception):
    """The run has no artifact that the zoo can ship; the message states why."""


def run_of(run: str) -> Run:
    """The run that `BENCH/METHOD/SEED` names.

    Raises:
        CannotShip: there is no such run, or it trains no composition.
    """
    bench, method, seed = run.split("/") if run.count("/") == 2 else ("", "", "")
    methods = {**ABLATIONS, **METHODS}
    if bench not in ALL_BENCHES or method not in methods or not seed.isdecimal():
        raise CannotShip(f"no run {run}: BENCH/METHOD/SEED, with a bench of {', '.join(ALL_BENCHES)}")
    found = Run(ALL_BENCHES[bench], methods[method], int(seed))
    if found.method.trains is not Trains.LATENT:
        trained = ", ".join(name for name, each in METHODS.items() if each.trains is Trains.LATENT)
        raise CannotShip(f"{method} trains no composition; these do: {trained}")
    return found


def ship(run: Run, root: Path, name: str, out: Path = SHIPPED) -> Path:
    """Write the artifact of a finished run to `out / name`, with its card, and list it in `out / EXPERTS`.

    Its weights keep their type if all files have at most MOST_BYTES together; else matrices become bfloat16.

    Args:
        root: folder of the runs.
        name: of the folder and of the composed expert.

    Raises:
        CannotShip: the run is not finished, its artifact is damaged or too large, a member is no expert of the zoo, or
            a file names a folder of this machine.
    """
    if not _NAME.fullmatch(name):
        raise CannotShip(f"{name!r} is no name of an artifact: lower-case letters, digits and hyphens")
    result, artifact = _finished(run, root)
    with TemporaryDirectory() as temporary:
        staged = Path(temporary) / name
        _write(staged, run, result, artifact, rounded=False)
        if size_of(staged) > MOST_BYTES:
            _write(staged, run, result, artifact, rounded=True)
        if (size := size_of(staged)) > MOST_BYTES:
            raise CannotShip(
                f"{run.id} has {size:,} bytes in bfloat16, and the zoo ships at most {MOST_BYTES:,}: train it with a "
                "smaller `shared_width`, fewer `interactions` or fewer members"
            )
        _check_paths(staged, (root, coe_home(), Path.home(), ZOO.parent.parent))
        with atomic_directory(out / name) as target:
            shutil.copytree(staged, target, dirs_exist_ok=True)
    with atomic_path(out / EXPERTS) as path:
        path.write_text(experts_text(out), encoding="utf-8")
    return out / name


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def experts_text(out: Path) -> str:
    """What `out / EXPERTS` lists: one composed expert for each artifact, by name."""
    entries = [_entry(file.parent) for file in sorted(out.glob(f"*/{FILE}"))]
    return _HEAD + yaml.safe_dump({"experts": entries}, sort_keys=False, width=114)


def _entry(folder: Path) -> dict[str, Any]:
    composed = read_composed(folder)
    return {
        "name": folder.name,
        "kind": "composed",
        "architecture": composed.architecture,
        "members": [*composed.members],
        "source": folder.name,
        "licence": {"gemma": "Gemma", "apache-2.0": "Apache-2.0"}[licence_of(composed.members)],
        "description": about(composed.architecture, composed.members),
    }


def _finished(run: Run, root: Path) -> tuple[Result, Artifact]:
    if (result := read_result(root / run.id)) is None:
        command = f"run --bench {run.bench.name} --method {run.method.name} --seed {run.seed}"
        raise CannotShip(f"{run.id} is not done: python -m examples.zoo.latent {command}")
    try:
        artifact = Artifact.read(root / run.id / "artifact")
        artifact.tensors()
    except WeightsError as error:
        raise CannotShip(f"{run.id}: {error}") from error
    if not (artifact.path / CARD).is_file():
        raise CannotShip(f"{artifact.path} has no {CARD}")
    if strange := [member for member in artifact.composed.members if base_of(member) not in BASES]:
        raise CannotShip(f"{run.id}: {', '.join(strange)} is no expert of the zoo")
    return result, artifact


def _write(folder: Path, run: Run, result: Result, artifact: Artifact, *, rounded: bool) -> None:
    tensors, adapter = artifact.tensors(), artifact.adapter

    def write_adapter(target: Path) -> None:
        assert adapter is not None
        shutil.copytree(adapter, target, dirs_exist_ok=True)
        if rounded:
            _round_file(target / "adapter_model.safetensors")

    Artifact.write(
        folder,
        artifact.composed,
        tensors={name: _rounded(name, tensor) for name, tensor in tensors.items()} if rounded else tensors,
        adapter=None if adapter is None else write_adapter,
        card=card_of(folder.name, run, result, artifact, rounded=rounded),
    )


def _rounded(name: str, tensor: Tensor) -> Tensor:
    import torch

    exact = tensor.dim() < 2 or name.rpartition(".")[2] in _EXACT
    return tensor if exact else tensor.to(torch.bfloat16)


def _round_file(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: _rounded(name, tensor) for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def _check_paths(folder: Path, private: Iterable[Path]) -> None:
    """Refuse files of text that name one of these folders of this machine."""
    names = {str(path.resolve()) for path in private} - {"/"}
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".md", ".jinja", ".yaml")):
        text = file.read_text(encoding="utf-8")
        if found := next((name for name in names if name in text), None):
            raise CannotShip(f"{file.relative_to(folder)} names {found}, a folder of this machine")
