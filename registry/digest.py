"""Identity is content: hashes of an expert's files, and the check that the files are the registered ones.

A digest covers the files that change answers: weights, tokenizer, chat template, configs. It does not cover model cards
or logs. Hashes are cached under `$COE_HOME/hashes`, by path, size and modification times, so that a check at every load
costs a few `stat` calls; `coe registry verify` ignores this cache.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from registry.errors import DigestMismatch, DiskFull, SourceError, UnknownExpert
from registry.spec import ExpertSpec, FileRecord
from registry.storage import atomic_path, coe_home, sha256_file

# fmt: off
_FILES = frozenset((
    "config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "composed.json", "delta.json",
))
# fmt: on
_SUBFOLDERS = re.compile(r"additional_chat_templates|\d+_\w+")  # named templates; modules of sentence-transformers
_COMPOSED_SUBFOLDERS = re.compile(r"adapter")  # of the folder of a composed expert
_HEX = re.compile(r"\b(sha256:[0-9a-f]{12})[0-9a-f]{52}\b")
_SETTLED_NS = 2_000_000_000  # a file modified this recently may change again within one clock tick: not cached


def digest_files(path: Path) -> list[Path]:
    """The files that an expert's digest covers, sorted by name: a GGUF file itself, or relevant files of a folder."""
    return sorted(_matching(path)) if path.is_dir() else [path]


def hash_files(
    path: Path, *, fresh: bool = False, on_bytes: Callable[[int], None] | None = None
) -> tuple[FileRecord, ...]:
    """Name, size and hash of each file that the digest covers; `fresh` ignores cached hashes.

    `on_bytes` is called with the bytes of each step, whether they were read or cached.
    """
    root = path if path.is_dir() else path.parent
    return tuple(
        FileRecord(
            name=file.relative_to(root).as_posix(),
            size_bytes=file.stat().st_size,
            sha256=sha256_file(file, on_bytes) if fresh else _cached(file, on_bytes),
        )
        for file in digest_files(path)
    )


def digest_of(records: Iterable[FileRecord]) -> str:
    """`sha256:...` over the sorted names and hashes."""
    lines = "".join(sorted(f"{record.name}\0{record.sha256}\n" for record in records))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def digest_of_text(*parts: str | None) -> str:
    """`sha256:...` of an expert without files: its address is its identity."""
    return "sha256:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def shown(text: str) -> str:
    """A digest or identity, or a text with some, for messages: of each digest its first 12 hexadecimal digits."""
    return _HEX.sub(r"\1", text)


def identity(spec: ExpertSpec, experts: Mapping[str, ExpertSpec]) -> str:
    """Identity of an expert by content: experts of the same identity give the same answers.

    It is the digest or, without one, a hash of source and name; that of an adapter includes its base, that of a
    composed expert its members. That of a delta is the identity of the files that it restores.

    Raises:
        UnknownExpert: a base or member is not among `experts`.
    """
    own = spec.restores or spec.digest or digest_of_text(spec.source, spec.revision, spec.model or spec.name)
    if spec.engine is not None:  # the same files may answer otherwise on another engine
        own = digest_of_text(own, "engine", spec.engine)
    if spec.tool_call_parser or spec.reasoning_parser:  # what is text and what is a call depends on them
        own = digest_of_text(own, "parsers", spec.tool_call_parser, spec.reasoning_parser)
    if unknown := [name for name in spec.references if name not in experts]:
        raise UnknownExpert(unknown[0], experts)
    parts = [identity(experts[name], experts) for name in spec.references if name != spec.delta_base]
    if spec.base is not None:
        return f"{own} on {parts[0]}"
    return digest_of_text(own, *parts) if parts else own


def check_files(
    spec: ExpertSpec, path: Path, *, fresh: bool = False, on_bytes: Callable[[int], None] | None = None
) -> None:
    """Compare an expert's files with the registered ones; cheap unless `fresh`, or a file was modified.

    Raises:
        SourceError: the files do not exist or cannot be read.
        DigestMismatch: lists all missing, truncated, altered and new files.
    """
    if not path.exists():
        raise SourceError(f"the files of {spec.ref} are missing: {path} does not exist")
    try:
        found = hash_files(path, fresh=fresh, on_bytes=on_bytes)
    except OSError as error:
        raise SourceError(f"the files of {spec.ref} cannot be read: {error}") from error
    if digest_of(found) == spec.digest:
        return
    changed = differences(spec.files, found)
    raise DigestMismatch(
        f"the files of {spec.ref} in {path} are not the ones registered: {'; '.join(changed)}. "
        f"Restore them, or read them again: `coe registry apply FILE` for a registry, a restart for experts files",
        changed,
    )


def _matching(folder: Path) -> Iterator[Path]:
    subfolders = _COMPOSED_SUBFOLDERS if (folder / "composed.json").is_file() else _SUBFOLDERS
    for entry in folder.iterdir():
        if entry.is_dir() and subfolders.fullmatch(entry.name):
            yield from (file for file in entry.iterdir() if _matters(file) or file.suffix == ".jinja")
        elif _matters(entry):
            yield entry


def _matters(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".") and (file.suffix == ".safetensors" or file.name in _FILES)


def differences(registered: Iterable[FileRecord], found: Iterable[FileRecord]) -> list[str]:
    """What has changed: names of missing, truncated, altered and new files."""
    then, now = ({record.name: record for record in records} for records in (registered, found))
    problems = [f"{name} is missing" for name in sorted(then.keys() - now.keys())]
    for name in sorted(then.keys() & now.keys()):
        before, after = then[name], now[name]
        if after.size_bytes < before.size_bytes:
            problems.append(f"{name} is truncated ({after.size_bytes:,} bytes of {before.size_bytes:,})")
        elif after.sha256 != before.sha256:
            problems.append(f"{name} differs")
    return problems + [f"{name} is new" for name in sorted(now.keys() - then.keys())]


def _cached(file: Path, on_bytes: Callable[[int], None] | None) -> str:
    """The hash of a file, from the cache if the file was not modified since."""
    stat = file.stat()
    place = str(file.resolve())
    key = [place, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    cache = coe_home() / "hashes" / f"{hashlib.sha256(place.encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):  # not cached, or a damaged cache file: hash again
        known = {}
    if isinstance(known, dict) and known.get("key") == key:
        if on_bytes is not None:
            on_bytes(stat.st_size)
        return str(known["sha256"])
    sha256 = sha256_file(file, on_bytes)
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS:
        # If the cache cannot be written (read-only, full), the next check is slower but still correct.
        with suppress(OSError, DiskFull), atomic_path(cache) as staged:
            staged.write_text(json.dumps({"key": key, "sha256": sha256}))
    return sha256
