"""The files that the command of a server names: its identity, and where its arguments lead on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from registry.commands import PORT, ServerCommand
from registry.digest import differences, digest_files, digest_of, digest_of_text, hash_files
from registry.errors import DigestMismatch, SourceError
from registry.sources import local_path
from registry.spec import ExpertSpec, FileRecord


def at_port(server: ServerCommand, port: int) -> tuple[list[str], dict[str, str]]:
    """The arguments and the additional environment for that port.

    Raises:
        SourceError: an argument begins with `~/`, and this user has no home.
    """
    arguments = [_expanded(argument.replace(PORT, str(port))) for argument in server.command]
    return arguments, {name: value.replace(PORT, str(port)) for name, value in server.env.items()}


def hash_command(
    server: ServerCommand, *, fresh: bool = False, on_bytes: Callable[[int], None] | None = None
) -> tuple[FileRecord, ...]:
    """Each file that the command names, by the text that names it, with its hash; see `registry.digest.hash_files`.

    Raises:
        SourceError: a stated file does not exist, or a file cannot be read.
    """
    records: list[FileRecord] = []
    for text, path in _named(server):
        try:
            found = hash_files(path, fresh=fresh, on_bytes=on_bytes)
        except OSError as error:
            raise SourceError(f"{path}, which the command names, cannot be read: {error}") from error
        names = (text if path.is_file() else f"{text}/{record.name}" for record in found)
        records += [record.model_copy(update={"name": name}) for record, name in zip(found, names, strict=True)]
    return tuple(records)


def command_bytes(server: ServerCommand) -> tuple[int, int]:
    """Bytes of the files that the command names: all of them, and all but the program, about its memory."""
    sizes = {text: sum(file.stat().st_size for file in digest_files(path)) for text, path in _named(server)}
    return sum(sizes.values()), sum(size for text, size in sizes.items() if text != server.command[0])


def command_digest(server: ServerCommand, model: str, files: tuple[FileRecord, ...]) -> str:
    """`sha256:...` of a command: its arguments and environment, the model's name at the server, and the named files."""
    environment = [part for name in sorted(server.env) for part in (name, server.env[name])]
    return digest_of_text("command", *server.command, "env", *environment, server.api, model, digest_of(files))


def check_command(spec: ExpertSpec, *, fresh: bool = False, on_bytes: Callable[[int], None] | None = None) -> Path:
    """Compare the files that an expert's command names with the registered ones; return the folder it runs in.

    Raises:
        SourceError: the folder or a stated file does not exist.
        DigestMismatch: lists all missing, altered and new files.
    """
    assert spec.server is not None
    folder = Path(spec.server.folder or ".")
    if not folder.is_dir():
        raise SourceError(f"the command of {spec.ref} runs in {folder}, which is no folder on this machine")
    found = hash_command(spec.server, fresh=fresh, on_bytes=on_bytes)
    if found != spec.files:
        changed = differences(spec.files, found)
        raise DigestMismatch(
            f"the files that the command of {spec.ref} names are not the ones registered: {'; '.join(changed)}. "
            "Restore them, or read them again: `coe registry apply FILE` for a registry, a restart for experts files. "
            "If the server writes one of them, state `files` in its source",
            changed,
        )
    return folder


def _named(server: ServerCommand) -> Iterator[tuple[str, Path]]:
    """What the digest covers: the text of `files`, or of the command, and the existing file or folder that it names."""
    folder = Path(server.folder or ".")
    for text in dict.fromkeys(_texts(server.command) if server.files is None else server.files):
        path = folder / _expanded(text)
        if _exists(path):
            yield text, path
        elif server.files is not None:
            raise SourceError(f"`files` names {text!r:.200}, but there is no {path}")


def _expanded(argument: str) -> str:
    """An argument with `~/` or `home://` at its beginning resolved; others stay as they are."""
    return str(local_path(argument)) if argument.startswith(("~/", "home://")) else argument


def _texts(command: tuple[str, ...]) -> Iterator[str]:
    """What may be paths: the arguments, and the values of `--option=value`."""
    for argument in command:
        yield argument
        if argument.startswith("-") and "=" in argument:
            yield argument.partition("=")[2]


def _exists(path: Path) -> bool:
    """Whether it is a file or folder; what the file system cannot hold (a name that is too long) is none."""
    try:
        return path.is_file() or path.is_dir()
    except (OSError, ValueError):
        return False
