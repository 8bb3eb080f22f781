"""The folder of a trained composition: `composed.json`, `weights.safetensors`, optionally `adapter/`, and a card.

    composed.json         architecture, members with their identities, settings (`registry.composed`)
    weights.safetensors   the trained tensors only, in float32 or bfloat16
    adapter/              a LoRA adapter of the primary's base that takes the place of the primary's own, as peft writes
    README.md             the card: data, steps, loss before and after

Settings of `notes`: those of the calls to the peers (`coe.engines.latent.settings`), `interaction` (the document of an
`InteractionShape`) and `max_notes`. Weights of members are not in the folder: an artifact is refused with members of
other contents than it was trained with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from coe.engines.latent.fitting import check_fit, sizes_of
from coe.errors import ConfigError, WeightsError
from registry.composed import FILE, Composed, read_composed
from registry.digest import identity, shown
from registry.errors import SourceError
from registry.headers import check_regular
from registry.lora.combining import OWN_ADAPTER
from registry.spec import ExpertSpec
from registry.storage import atomic_directory

if TYPE_CHECKING:
    from torch import Tensor, nn

    from coe.engines.latent.interaction import Interactions

WEIGHTS: Final = "weights.safetensors"
CARD: Final = "README.md"
INTERACTION: Final = "interaction"
"""The setting that holds the document of an `InteractionShape`."""
_MOST_WEIGHT_BYTES: Final = 2**33
_DTYPES: Final = ("F32", "BF16")


@dataclass(frozen=True, slots=True)
class Artifact:
    """A trained composition on disk.

    Attributes:
        path: the folder.
        composed: architecture, members (the primary first) and settings.
    """

    path: Path
    composed: Composed

    @classmethod
    def read(cls, path: Path) -> Artifact:
        """The artifact in a folder; its tensors are not read yet.

        Raises:
            WeightsError: `composed.json` is missing, damaged, too large or of another format.
        """
        try:
            return cls(path, read_composed(path))
        except SourceError as error:
            raise WeightsError(f"{path} is not a trained composition: {error}") from error

    @property
    def adapter(self) -> Path | None:
        """The folder of the primary's trained LoRA adapter, if there is one."""
        folder = self.path / OWN_ADAPTER
        return folder if (folder / "adapter_config.json").is_file() else None

    @property
    def primary(self) -> str:
        """The member that answers."""
        return next(iter(self.composed.members))

    @property
    def peers(self) -> tuple[str, ...]:
        """The members that leave notes."""
        return tuple(self.composed.members)[1:]

    def check_members(self, experts: Mapping[str, ExpertSpec]) -> None:
        """Compare the registered members with those of the training.

        Args:
            experts: by name; the members and their bases are among them, if they are registered.

        Raises:
            WeightsError: names every member that is missing, or is not what it was trained with.
        """
        known = {name: identity(experts[name], experts) for name in self.composed.members if name in experts}
        problems = [f"{name!r} is not registered" for name in self.composed.members if name not in known]
        problems += [
            f"{name!r} was trained with as {shown(then)}, and is now {shown(known[name])}"
            for name, then in self.composed.members.items()
            if known.get(name, then) != then
        ]
        if problems:
            raise WeightsError(
                f"the composition in {self.path} was trained with other experts: {'; '.join(problems)}. Restore their "
                "files, or train it again (`coe latent train`)"
            )

    def interactions(self) -> Interactions:
        """The trained cross-attentions of a composition over the channel `cross`, in float32 on the CPU.

        Raises:
            WeightsError: the settings state no valid shape, or the tensors do not fit it.
        """
        from coe.engines.latent.interaction import Interactions
        from coe.engines.latent.shape import InteractionShape

        try:
            shape = InteractionShape.of(self.composed.settings.get(INTERACTION))
        except ConfigError as error:
            raise WeightsError(f"{self.path / FILE}: settings.{INTERACTION}: {error}") from error
        if missing := [name for name in self.peers if name not in shape.peers]:
            raise WeightsError(f"{self.path / FILE}: settings.{INTERACTION} lacks the peer {missing[0]!r}")
        saved = self.tensors()
        check_fit(saved, shape.matrices(), what=str(self.path / WEIGHTS), among=True)  # before memory is taken for them
        module = Interactions(shape)
        self._load_into(module, saved)
        return module.eval().requires_grad_(False)

    def load_into(self, module: nn.Module) -> None:
        """Copy the saved tensors into a module of the same shape.

        Raises:
            WeightsError: a tensor is missing, unknown, of another shape or type, or not finite.
        """
        self._load_into(module, self.tensors())

    def _load_into(self, module: nn.Module, saved: Mapping[str, Tensor]) -> None:
        check_fit(saved, sizes_of(module.state_dict()), what=str(self.path / WEIGHTS))
        module.load_state_dict(saved)

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by name; empty for a composition that trains only an adapter.

        Raises:
            WeightsError: the file is missing, damaged or too large, or has a tensor of another type than float32 or
                bfloat16.
        """
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file

        path = self.path / WEIGHTS
        try:
            if (size := check_regular(path)) > _MOST_WEIGHT_BYTES:
                raise WeightsError(f"{path} has {size:,} bytes; the most is {_MOST_WEIGHT_BYTES:,}")
            with safe_open(path, framework="pt") as file:
                types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 # no mapping
            if wrong := [f"{name} ({dtype})" for name, dtype in types.items() if dtype not in _DTYPES]:
                raise WeightsError(f"{path} has tensors of other types than {', '.join(_DTYPES)}: {wrong[0]}")
            return dict(load_file(path))
        except (OSError, SourceError, SafetensorError) as error:
            raise WeightsError(f"{path} cannot be read: {error}") from error

    @classmethod
    def write(
        cls,
        path: Path,
        composed: Composed,
        *,
        tensors: Mapping[str, Tensor],
        adapter: Callable[[Path], None] | None = None,
        card: str,
    ) -> Artifact:
        """Write a folder atomically; an existing one is replaced.

        Args:
            composed: its settings are JSON values.
            tensors: the trained tensors, in float32 or bfloat16.
            adapter: writes the primary's adapter into a folder, if one was trained.
            card: text of README.md.

        Raises:
            DiskFull: no space left; the target is unchanged.
        """
        from safetensors.torch import save_file

        with atomic_directory(path) as staged:
            # Copies, because safetensors refuses tensors that share memory.
            copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
            save_file(copies, staged / WEIGHTS)
            document = json.dumps(composed.document(), indent=2, ensure_ascii=False, allow_nan=False)
            (staged / FILE).write_text(document + "\n", encoding="utf-8")
            (staged / CARD).write_text(card, encoding="utf-8")
            if adapter is not None:
                (staged / OWN_ADAPTER).mkdir()
                adapter(staged / OWN_ADAPTER)
        return cls.read(path)
