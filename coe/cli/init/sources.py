"""What the arguments of `coe init` are: models, adapters and endpoints, as entries of an experts file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from coe.cli.init.endpoint import list_models
from coe.cli.init.found import ADAPTER_CONFIG, MODEL_CONFIG, MODULES, Found, stated_base
from coe.cli.init.hub import describe_repository
from coe.errors import ConfigError
from registry.errors import RegistryError, SourceError, without_userinfo
from registry.gguf_header import is_gguf
from registry.headers import ADAPTER_FILE, read_json
from registry.inspection import Facts, inspect
from registry.lora.check import read_lora
from registry.sources import SourceKind, absolute_source, local_path, names_gguf, path_exists, source_kind
from registry.spec import RESERVED_NAMES, RESERVED_PREFIX, Kind
from registry.storage import coe_home

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(/[\w./ -]+(?i:\.gguf))?(@[\w./-]+)?")
_MOST_EXPERTS = 200


def inspect_sources(
    sources: Sequence[str], *, api_key_env: str | None, timeout_s: float
) -> tuple[list[Found], list[str]]:
    """The experts that the arguments are, and notes for the reader.

    Args:
        api_key_env: environment variable with the key of the endpoints.
        timeout_s: seconds for each endpoint.

    Raises:
        ConfigError: arguments that are no expert, all of them at once.
    """
    found, notes, problems = [], [], []
    for source in dict.fromkeys(sources):
        try:
            experts, more = _inspect(source, api_key_env, timeout_s)
        except (RegistryError, ConfigError) as error:
            problems.append(f"{_shown(source)}: {error}")
            continue
        except OSError as error:
            problems.append(f"{_shown(source)}: cannot be read: {error.strerror}")
            continue
        found += experts
        notes += more
    _name(found)
    if not problems:
        problems += _find_bases(found, notes, timeout_s)
    if problems:
        raise ConfigError("\n".join(problems))
    if len(found) > _MOST_EXPERTS:
        raise ConfigError(f"these are {len(found)} experts, more than {_MOST_EXPERTS}: name fewer of them")
    return found, notes


def _inspect(source: str, api_key_env: str | None, timeout_s: float) -> tuple[list[Found], list[str]]:
    if not source.strip():
        raise SourceError("an empty argument is no model: name a folder, a GGUF file, a repository or a URL")
    path = local_path(source)
    if "://" not in source and not path_exists(path) and _REPOSITORY.fullmatch(source):
        source = f"hf://{source}"
    match source_kind(source):
        case SourceKind.REMOTE:
            return list_models(source, api_key_env, timeout_s)
        case SourceKind.HUB:
            found, notes = describe_repository(source, timeout_s)
            return [found], notes
        case SourceKind.FAKE:
            entry = {"name": source.removeprefix("fake://").partition("?")[0], "kind": "model", "source": source}
            return [Found(entry, comment="no weights: for tests")], []
    left_out: list[str] = []
    return list(_local(path, left_out)), left_out


def _shown(source: str) -> str:
    """An argument in a message: without passwords and queries, at most 120 characters, nothing invisible."""
    text = without_userinfo(source)
    text = text.partition("?")[0] if text.startswith(("http://", "https://")) else text
    text = text if len(text) <= 120 else f"{text[:117]}..."
    return text if text and text.isprintable() else repr(text)


def _is_text(path: Path) -> bool:
    """Whether a YAML file can hold the path; Linux also has names that are not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _local(path: Path, notes: list[str]) -> Iterator[Found]:
    if not path_exists(path):
        raise SourceError("there is no such file or folder; a repository on the hub is written org/name")
    path = Path(absolute_source(str(path), Path.cwd()))
    if not _is_text(path):
        raise SourceError("the name is not valid UTF-8: rename it")
    if not path.is_dir() and not path.is_file():
        raise SourceError("is a pipe, socket or device, not a file or folder")
    if path.is_file() or (one := _of_folder(path)) is None:
        yield from [_gguf(path)] if path.is_file() else _inside(path, notes)
    else:
        yield one


def _of_folder(path: Path) -> Found | None:
    """The expert of a folder that is one; `None` for others."""
    if (path / ADAPTER_CONFIG).is_file():
        if not (path / ADAPTER_FILE).is_file():
            raise SourceError(f"the adapter has no {ADAPTER_FILE}: adapters are read from safetensors only")
        return Found(_entry(path, Kind.ADAPTER), path, origin=stated_base(read_json(path / ADAPTER_CONFIG)))
    if not (path / MODEL_CONFIG).is_file():
        return None
    if (path / MODULES).is_file():
        entry = _entry(path, Kind.EMBEDDING) | {"capabilities": ["embedding"]}
        return Found(entry, path, "makes vectors, answers nothing")
    return _model(path)


def _inside(folder: Path, notes: list[str]) -> Iterator[Found]:
    """The experts that a folder holds: its GGUF files, and its subfolders that are models or adapters."""
    paths = sorted(folder.iterdir())
    notes += [f"{_shown(str(path))} is left out: the name is not valid UTF-8" for path in paths if not _is_text(path)]
    paths = [path for path in paths if _is_text(path)]
    found = [_gguf(path) for path in paths if names_gguf(path.name) and not path.is_dir()]
    found += [one for path in paths if path.is_dir() and (one := _of_folder(path)) is not None]
    if not found:
        raise SourceError(
            f"the folder has neither {MODEL_CONFIG} (a model) nor {ADAPTER_CONFIG} (an adapter), "
            "and no GGUF file, model or adapter inside"
        )
    yield from found


def _gguf(path: Path) -> Found:
    if not names_gguf(path.name) and not is_gguf(path):
        raise SourceError("is neither a folder nor a .gguf file")
    return _model(path)


def _model(path: Path) -> Found:
    facts = inspect(path)
    return Found(_entry(path, Kind.MODEL), path, _described(facts), path.stem, facts)


def _entry(path: Path, kind: Kind) -> dict[str, Any]:
    return {"name": path.stem if names_gguf(path.name) else path.name, "kind": kind.value, "source": str(path)}


def _described(facts: Facts) -> str:
    context = "" if facts.context_length is None else f", context {facts.context_length:,} tokens"
    size = f"{facts.parameters_total / 1e6:,.0f}M parameters, {facts.size_bytes / 2**20:,.0f} MiB"
    return f"{facts.architecture}, {size}{context}"


def _name(found: Sequence[Found]) -> None:
    """Names that the registry takes, all different."""
    taken: set[str] = set()
    for one in found:
        plain = re.sub(r"[^a-z0-9._/-]+", "-", one.name.lower()).strip("._/-")[:120] or "expert"
        if plain in RESERVED_NAMES or plain.startswith(RESERVED_PREFIX):
            plain = f"expert-{plain.replace('/', '-')}"
        name, number = plain, 1
        while name in taken:
            number += 1
            name = f"{plain}-{number}"
        taken.add(name)
        one.entry["name"] = name


def _find_bases(found: list[Found], notes: list[str], timeout_s: float) -> Iterator[str]:
    """Set `base` of every adapter, adding models that are found elsewhere; a base that is not found is a problem."""
    for adapter in [one for one in found if one.kind is Kind.ADAPTER]:
        stated = f" (its config says {_shown(adapter.origin)!r})" if adapter.origin else ""
        place = adapter.path or adapter.entry["source"]
        try:
            base = _base_among(adapter, found) or _base_elsewhere(adapter, timeout_s)
        except (RegistryError, OSError) as error:
            yield f"{place}: the base of this adapter{stated} cannot be read: {error}"
            continue
        if base is None:
            yield f"{place}: the base of this adapter{stated} is not among the arguments: add its folder"
            continue
        if base not in found:
            found.append(base)
            _name(found)
            notes.append(f"{base.path or base.entry['source']} is added: the base of {adapter.name}")
        adapter.entry = {**adapter.entry, "base": base.name}
        adapter.comment = f"on {base.name}"


def _base_among(adapter: Found, found: Sequence[Found]) -> Found | None:
    """The model that the adapter's config names, else the only one that its weights fit."""
    models = [one for one in found if one.kind is Kind.MODEL]
    fitting = [one for one in models if _fits(adapter, one)]
    named = [one for one in fitting if _is_named(one, adapter.origin)]
    if named:
        return named[0]
    local = [one for one in fitting if one.facts is not None and adapter.path is not None]
    return local[0] if len(local) == 1 else None


def _fits(adapter: Found, base: Found) -> bool:
    if adapter.path is None or base.facts is None:
        return True  # not downloaded yet: the name decides
    try:
        read_lora(adapter.path, base.name, base.facts)
    except SourceError:
        return False
    return True


def _is_named(model: Found, origin: str) -> bool:
    """Whether `origin`, a path or a repository of an adapter's config, is this model."""
    if not origin:
        return False
    if model.path is not None and path_exists(local_path(origin)):
        return local_path(origin).resolve() == model.path
    return Path(origin).name.lower() == Path(model.origin).name.lower()


def _base_elsewhere(adapter: Found, timeout_s: float) -> Found | None:
    """The base where the adapter's config says it is, beside the adapter, under $COE_HOME/models, or on the hub."""
    if not adapter.origin:
        return None
    name = Path(adapter.origin).name
    beside = [] if adapter.path is None else [adapter.path.parent]
    for path in (local_path(adapter.origin), *_folders_named(name, *beside, coe_home() / "models")):
        if path_exists(path) and (base := next(iter(_local(path, [])), None)) is not None and base.kind is Kind.MODEL:
            return base if _fits(adapter, base) else None
    return (
        describe_repository(f"hf://{adapter.origin}", timeout_s)[0] if _REPOSITORY.fullmatch(adapter.origin) else None
    )


def _folders_named(name: str, *parents: Path) -> Iterator[Path]:
    for parent in parents:
        yield from (path for path in (parent.iterdir() if parent.is_dir() else ()) if path.name.lower() == name.lower())
