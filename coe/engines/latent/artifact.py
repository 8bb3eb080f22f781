"""The folder of a trained composition: `composed.json`, `weights.safetensors`, optionally `adapter/`, and a card.

    composed.json         {"format": 1, "architecture": "notes", "members": [{"name": ..., "digest": ...}, ...],
                           "settings": {...}}          the first member is the primary
    weights.safetensors   the trained tensors only, in float32 or bfloat16
    adapter/              a LoRA adapter of the primary's base that takes the place of the primary's own, as peft writes
    README.md             the card: data, steps, loss before and after

Weights of members are not in it: an artifact is refused with members of other digests than it was trained with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from coe.errors import WeightsError
from registry.errors import SourceError
from registry.headers import check_regular, read_json
from registry.spec import ExpertSpec
from registry.storage import atomic_directory

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT: Final = 1
META: Final = "composed.json"
WEIGHTS: Final = "weights.safetensors"
ADAPTER: Final = "adapter"
CARD: Final = "README.md"
_MOST_META_BYTES: Final = 2**20
_MOST_WEIGHT_BYTES: Final = 2**33
_MOST_MEMBERS: Final = 33
_DTYPES: Final = ("F32", "BF16")


@dataclass(frozen=True, slots=True)
class TrainedMember:
    """A member as it was when the composition was trained. digest: of its files; None if it has none."""

    name: str
    digest: str | None

    @classmethod
    def of(cls, spec: ExpertSpec) -> TrainedMember:
        """The member's identity now."""
        return cls(spec.name, spec.digest)


@dataclass(frozen=True, slots=True)
class Artifact:
    """What `composed.json` of a folder states.

    Attributes:
        path: the folder.
        architecture: kind of composition, such as `notes`.
        members: the primary first.
        settings: JSON values; their meaning depends on the architecture.
    """

    path: Path
    architecture: str
    members: tuple[TrainedMember, ...]
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Artifact:
        """The artifact in a folder; its tensors are not read yet.

        Raises:
            WeightsError: a file is missing, damaged, too large or of another format.
        """
        try:
            document = read_json(path / META, most_bytes=_MOST_META_BYTES)
        except SourceError as error:
            raise WeightsError(f"{path} is not a trained composition: {error}") from error
        if document.get("format") != FORMAT:
            raise WeightsError(
                f"{path / META} has the format {document.get('format')!r}; this version reads format {FORMAT}: train "
                "the composition again, or install the version that wrote it"
            )
        architecture, settings = document.get("architecture"), document.get("settings", {})
        if not isinstance(architecture, str) or not isinstance(settings, dict):
            raise WeightsError(f"{path / META} needs an architecture (text) and settings (a mapping)")
        return cls(path, architecture, _members(path, document.get("members")), settings)

    @property
    def adapter(self) -> Path | None:
        """The folder of the primary's trained LoRA adapter, if there is one."""
        folder = self.path / ADAPTER
        return folder if (folder / "adapter_config.json").is_file() else None

    @property
    def primary(self) -> TrainedMember:
        """The member that answers."""
        return self.members[0]

    @property
    def peers(self) -> tuple[TrainedMember, ...]:
        """The members that leave notes."""
        return self.members[1:]

    def check_members(self, specs: Iterable[ExpertSpec]) -> None:
        """Compare the registered members with those of the training.

        Raises:
            WeightsError: names every member that is missing, or has other files than trained with.
        """
        known = {spec.name: spec for spec in specs}
        problems = [f"{each.name!r} is not among the members" for each in self.members if each.name not in known]
        problems += [
            f"{each.name!r} has the digest {_short(known[each.name].digest)}, and was trained with "
            f"{_short(each.digest)}"
            for each in self.members
            if each.name in known and known[each.name].digest != each.digest
        ]
        if problems:
            raise WeightsError(
                f"the composition in {self.path} was trained with other experts: {'; '.join(problems)}. Restore their "
                "files, or train it again (`coe latent train`)"
            )

    def load_into(self, module: nn.Module) -> None:
        """Copy the saved tensors into a module of the same shape.

        Raises:
            WeightsError: a tensor is missing, unknown, of another shape or type, or not finite.
        """
        own, saved = module.state_dict(), self.tensors()
        problems = [f"{name} is missing" for name in sorted(own.keys() - saved.keys())]
        problems += [f"{name} is unknown" for name in sorted(saved.keys() - own.keys())]
        problems += [
            f"{name} has the shape {tuple(saved[name].shape)} instead of {tuple(own[name].shape)}"
            for name in sorted(own.keys() & saved.keys())
            if saved[name].shape != own[name].shape
        ]
        problems = problems or [f"{name} has values that are not finite" for name in _not_finite(saved)]
        if problems:
            raise WeightsError(f"{self.path / WEIGHTS} does not fit its settings: {'; '.join(problems[:5])}")
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
        *,
        architecture: str,
        members: Sequence[TrainedMember],
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        adapter: Callable[[Path], None] | None = None,
        card: str,
    ) -> Artifact:
        """Write a folder atomically; an existing one is replaced.

        Args:
            members: the primary first.
            settings: JSON values.
            tensors: the trained tensors, in float32 or bfloat16.
            adapter: writes the primary's adapter into a folder, if one was trained.
            card: text of README.md.

        Raises:
            DiskFull: no space left; the target is unchanged.
        """
        from safetensors.torch import save_file

        document = {
            "format": FORMAT,
            "architecture": architecture,
            "members": [{"name": each.name, "digest": each.digest} for each in members],
            "settings": dict(settings),
        }
        with atomic_directory(path) as staged:
            # Copies, because safetensors refuses tensors that share memory.
            copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
            save_file(copies, staged / WEIGHTS)
            (staged / META).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            (staged / CARD).write_text(card, encoding="utf-8")
            if adapter is not None:
                (staged / ADAPTER).mkdir()
                adapter(staged / ADAPTER)
        return cls.read(path)


def _members(path: Path, value: Any) -> tuple[TrainedMember, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= _MOST_MEMBERS:
        raise WeightsError(f"{path / META} needs a list of 1 to {_MOST_MEMBERS} members")
    members = []
    for each in value:
        name, digest = (each.get("name"), each.get("digest")) if isinstance(each, dict) else (None, None)
        if not isinstance(name, str) or not (digest is None or isinstance(digest, str)):
            raise WeightsError(f"{path / META}: every member needs a name and a digest (text)")
        members.append(TrainedMember(name, digest))
    if len({member.name for member in members}) < len(members):
        raise WeightsError(f"{path / META} names a member twice")
    return tuple(members)


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in sorted(tensors.items()) if not bool(tensor.isfinite().all())]


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:19]
