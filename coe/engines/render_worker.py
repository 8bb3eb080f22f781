"""A process that renders chat templates: `python render_worker.py FD`, started by `coe.engines.render`.

It has an interpreter of its own, because limits of CPU time and memory hold for a process only: one operation of a
template (`'a' * 10**10`) may take all of either before any check in Python runs. It imports Jinja and the standard
library, nothing else, so that it starts in a moment and takes little memory.

A request is one message on a socket, of JSON objects in lines: what its renders share, then each render. Every render
has a reply of its own, in order and as soon as it is done:

    {"template", "cpu_s", "together_s"}
    {"variables", "most_characters"}     -> {"text"} or {"error": kind, "message"}
    ...

The kind is `refused` (the template calls `raise_exception`, or fails on this conversation only), `broken` (it fails on
every conversation), `limit`, `memory`, or `later`: the renders before have taken `together_s`, and this one was not
started. The limits are those of each render. A process that exceeds its CPU time ends without a reply.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_PROBE = [{"role": "user", "content": "Hello"}]
_PROBE_TOOL = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
_MOST_MESSAGE_CHARACTERS = 500
_NO_MEMORY = "it takes too much memory"


class Refused(jinja2.TemplateError):
    """The template called `raise_exception`."""


class TooLarge(Exception):
    """The text is longer than the limit."""


class _Generation(Extension):
    """`{% generation %}` marks the answers of the assistant, for training. Rendering leaves them as they are."""

    tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    @staticmethod
    def _content(caller: Any) -> Any:
        return caller()


def environment() -> ImmutableSandboxedEnvironment:
    """The environment in which transformers renders chat templates."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _refuse
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: Any) -> None:
    raise Refused(message)


@lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


def _render(template: str, variables: Mapping[str, Any], most_characters: int) -> str:
    pieces, n_characters = [], 0
    for piece in _compiled(template).generate(variables):
        n_characters += len(piece)
        if n_characters > most_characters:
            raise TooLarge(f"the text is longer than {most_characters:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def answer(template: str, render: Mapping[str, Any]) -> dict[str, str]:
    """The reply to one render."""
    variables, most = render["variables"], render["most_characters"]
    try:
        return {"text": _render(template, variables, most)}
    except Refused as error:
        return _error("refused", str(error))
    except MemoryError:
        return _error("memory", _NO_MEMORY)
    except TooLarge as error:
        return _error("limit", str(error))
    except (jinja2.TemplateSyntaxError, SecurityError) as error:
        return _error("broken", _shown(error))
    except Exception as error:  # a template can raise anything that Python can
        return _error("refused" if _renders(template, variables, most) else "broken", _shown(error))


def _renders(template: str, variables: Mapping[str, Any], most_characters: int) -> bool:
    """Whether the template takes the simplest conversation; one that does not is of no use to anyone.

    Of the variables, only the special tokens remain: the others are of the caller.
    """
    probe = {name: value for name, value in variables.items() if name.endswith("_token")}
    tools = [{"type": "function", "function": _PROBE_TOOL}] if variables.get("tools") else None
    probe |= {"messages": _PROBE, "tools": tools, "documents": None, "add_generation_prompt": True}
    try:
        _render(template, probe, most_characters)
    except Refused:
        return True
    except Exception:
        return False
    return True


def _shown(error: Exception) -> str:
    line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return f"{line}{type(error).__name__}: {error}"


def _error(kind: str, message: str) -> dict[str, str]:
    return {"error": kind, "message": message[:_MOST_MESSAGE_CHARACTERS]}


def main(fd: int, memory_bytes: int) -> None:
    """Reply to requests until the other end closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whatever the parent made of it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    connection = Connection(fd)
    while True:
        try:
            for reply in _replies(connection.recv_bytes()):
                connection.send_bytes(reply)
        except EOFError:
            return


def _replies(data: bytes) -> Iterator[bytes]:
    """The reply to each render of a request."""
    head, *renders = data.split(b"\n")
    shared = json.loads(head)
    until = time.monotonic() + shared["together_s"]
    for number, render in enumerate(renders):
        late = number > 0 and time.monotonic() > until
        yield b'{"error": "later"}' if late else _reply(shared, render)


def _reply(shared: Mapping[str, Any], render: bytes) -> bytes:
    try:
        parsed = json.loads(render)
        signal.setitimer(signal.ITIMER_PROF, shared["cpu_s"])  # SIGPROF ends the process
        return json.dumps(answer(shared["template"], parsed)).encode()
    except MemoryError:
        return json.dumps(_error("memory", _NO_MEMORY)).encode()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
