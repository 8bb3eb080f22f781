"""The experts of a configuration, and the verified local files of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from coe.config import Config
from coe.engines.convert import convert_gguf, is_converted
from registry.command_files import check_command
from registry.database import shown_url
from registry.deltas.cache import restored
from registry.deltas.manifest import is_delta, read_delta
from registry.describe import check_delta_base
from registry.digest import check_files
from registry.documents import load_document
from registry.errors import RegistryError, UnknownExpert
from registry.reconcile import apply, plan
from registry.sources import has_files, resolve
from registry.spec import ExpertSpec
from registry.storage import coe_home
from registry.store import Registry, Snapshot

IN_MEMORY = "sqlite://"


def open_snapshot(config: Config) -> Snapshot:
    """The experts of the configured registry, or of the `experts` files.

    None is drained or pinned: that is stated for a running service, not for the processes of a command.

    Raises:
        InvalidSpec: an experts file is wrong; every problem at once.
        RegistryError: the registry cannot be opened.
    """
    with open_registry(config) as registry:
        fill(registry, config.experts)
        return replace(registry.snapshot(), drained={}, pinned=frozenset())


def open_registry(config: Config) -> Registry:
    """The configured registry; an empty one in memory if the configuration has `experts` files."""
    return Registry(IN_MEMORY if config.experts else config.registry)


def how_to_register(config: Config) -> str:
    """What adds experts to those of a configuration, for error messages."""
    if config.experts:
        return f"add them to {config.experts[0]}"
    registry = "" if config.registry is None else f" --registry {shown_url(config.registry)}"
    return f"`coe registry apply FILE{registry}` registers them, or name the file in the configuration: experts: [FILE]"


def fill(registry: Registry, files: Sequence[Path]) -> None:
    """Make a registry in memory hold the experts of the files and nothing else; unchanged experts keep their version.

    Raises:
        InvalidSpec: a file is wrong; every problem at once.
    """
    if files:
        named = {spec.name for path in files for spec in apply(plan(load_document(path), registry), registry)}
        registry.change(remove=[name for name in registry.snapshot() if name not in named])


def locate(spec: ExpertSpec, experts: Mapping[str, ExpertSpec] = MappingProxyType({})) -> Path:
    """The folder of an expert's files: downloaded if missing and verified.

    A GGUF file is converted once for the `hf` engine, and a delta is restored once. Blocks.

    Args:
        experts: by name; among them the base of a delta.

    Raises:
        SourceError: the files are not available, or a delta's base is not, or has other contents now.
        DigestMismatch: they are not the registered ones.
        WeightsError: a GGUF file cannot be converted.
    """
    if spec.server is not None:
        return check_command(spec)
    if not has_files(spec):  # remote and fake experts
        return Path()
    path = resolve(spec)
    check_files(spec, path)
    if path.is_file() and spec.engine in (None, "hf"):  # GGUF, whatever its name; other engines read it themselves
        assert spec.digest is not None  # check_files compared with it
        out = _converted(spec.digest)
        # The hash that was just compared: hashing a large file again would take most of a load.
        return out if is_converted(out, source_sha256=spec.files[0].sha256) else convert_gguf(path, out)
    if is_delta(path):
        return restored(path, _delta_base(spec, path, experts))
    return path


def locator(experts: Mapping[str, ExpertSpec]) -> Callable[[ExpertSpec], Path]:
    """`locate` among these experts."""
    return partial(locate, experts=experts)


def _delta_base(spec: ExpertSpec, path: Path, experts: Mapping[str, ExpertSpec]) -> Path | None:
    """The safetensors of the base of a delta, None where it needs none."""
    if spec.delta_base is None:
        return None
    if spec.delta_base not in experts:
        raise UnknownExpert(spec.delta_base, experts, where="the experts here, which the weights are stored from")
    check_delta_base(spec, read_delta(path), experts)
    return locate(experts[spec.delta_base].model_copy(update={"engine": "hf"}))  # for which GGUF is converted


def tokenizer_file(spec: ExpertSpec) -> Path | None:
    """`tokenizer.json` of an expert that is not an adapter, where its files are on this machine: nothing is downloaded.

    That of a GGUF file is in the folder of its conversion, once an engine has loaded it.
    """
    if not has_files(spec):
        return None
    try:
        path = resolve(spec, download=False)
        if path.is_file():
            if spec.digest is None:
                return None
            path = _converted(spec.digest)
        file = path / "tokenizer.json"
        return file if file.is_file() else None
    except (RegistryError, OSError):  # such as a gateway without access to the files
        return None


def _converted(digest: str) -> Path:
    """The folder into which the GGUF file of that digest is converted."""
    return coe_home() / "converted" / digest.removeprefix("sha256:")[:32]
