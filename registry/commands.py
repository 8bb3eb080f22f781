"""Servers that an expert's command starts: the command, the files that it names, and their identity.

experts:
  - name: coder
    kind: remote
    context_length: 8192
    source: {command: [llama-server, -m, models/coder.gguf, --port, "{port}"]}

A command is read from an experts file or the registry, which the operator writes, and from nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SCHEME = "command://"
PORT = "{port}"
_MOST_CHARACTERS = 65_536
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
Text = Annotated[str, Field(max_length=_MOST_CHARACTERS)]


class ServerCommand(BaseModel):
    """The mapping `source` of a remote expert: how its OpenAI-compatible server is started on this machine.

    The server starts at the first request, listens on 127.0.0.1 and is stopped when its memory is needed. It inherits
    the environment of the service, keys included. The command is executed as it is, without a shell.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    command: Annotated[tuple[Text, ...], Field(min_length=1, max_length=1024)]
    """The program and its arguments. `{port}` is replaced by a free port of 127.0.0.1, on which the server must listen.
    An argument may begin with `~/` or `home://` (a path under `$COE_HOME`)."""
    folder: str | None = None
    """The folder in which the command runs, and from which its relative paths start; null takes that of the experts
    file."""
    files: tuple[Text, ...] | None = None
    """Files and model folders that determine the answers, of which the digest is made; null takes those that the
    command names. State it if the command also names a file that the server writes, such as its log."""
    env: Mapping[str, Text] = Field(default={}, max_length=256, repr=False)
    """Environment variables beside those of the service, such as `{OMP_NUM_THREADS: "4"}`; `{port}` is replaced. No
    secrets: export them in the environment of the service, which the server inherits."""
    api: str = "/v1"
    """Path of the OpenAI-compatible API."""
    health: str | None = None
    """Path that answers 200 once the server is ready; null takes `/health` or, if there is none, `/models` of the
    API."""
    start_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 120.0
    """Seconds until the server must be ready."""
    stop_timeout_s: Annotated[float, Field(ge=0, le=300)] = 10.0
    """Seconds between SIGTERM and SIGKILL when the server is stopped."""
    capacity: Annotated[int, Field(ge=1, le=4096)] = 8
    """Requests that the server answers at once; more wait in the host."""
    measure: bool = True
    """Count the resident memory of the server's processes once it runs, in place of `size_bytes`. false counts
    `size_bytes` only, such as for a server whose weights are on a GPU."""

    @field_validator("command", "files")
    @classmethod
    def _are_arguments(cls, arguments: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if any("\0" in argument for argument in arguments or ()):
            raise ValueError("an argument holds a NUL character, which no program can be given")
        return arguments

    @field_validator("env")
    @classmethod
    def _are_variables(cls, env: Mapping[str, str]) -> Mapping[str, str]:
        for name, value in env.items():
            if not _NAME.fullmatch(name) or "\0" in value:
                raise ValueError(f"{name[:80]!r} is no environment variable that a program can be given")
        return env

    @field_validator("api", "health")
    @classmethod
    def _is_a_path(cls, path: str | None) -> str | None:
        if path is not None and not re.fullmatch(r"(/[\w.~%+-]+)+(\?[\w.~%+=&-]*)?|/", path):
            raise ValueError(f"{path[:80]!r} is not a path of the server, such as /health")
        return path

    @model_validator(mode="after")
    def _has_a_program_and_a_port(self) -> ServerCommand:
        if not self.command[0].strip():
            raise ValueError("the first entry of `command` is the program; it is empty")
        if not any(PORT in text for text in (*self.command, *self.env.values())):
            raise ValueError(
                f"`command` does not say where {PORT} goes: write it in place of the number of the port, such as "
                '[llama-server, -m, model.gguf, --port, "{port}"]'
            )
        return self

    @property
    def source(self) -> str:
        """What stands for it as `ExpertSpec.source`: `command://` and the name of the program."""
        return SCHEME + (Path(self.command[0]).name or "server")
