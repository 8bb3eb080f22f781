"""What stays after the demo: its experts in the default registry, its results, and the commands to go on with."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from registry.documents import load_document
from registry.reconcile import apply, plan
from registry.store import Registry

QUESTION = "Show me the first 12 lines of notes.txt"


def register(experts: Path) -> str:
    """Register the experts of a file where `coe registry list` looks for them; returns what was done.

    Experts that are registered under the same names with other contents are not replaced.
    """
    with Registry(os.environ.get("COE_REGISTRY")) as registry:
        planned = plan(load_document(experts), registry)
        if taken := [step.name for step in planned.steps if step.action == "update"]:
            command = _shown("registry", "apply", _relative(experts))
            return f"registry: other experts are named {', '.join(taken)}; `{command}` replaces them"
        apply(planned, registry)
    return f"registry: {len(planned.steps)} experts in {registry.url}"


def next_commands(config: Path, results: Path) -> str:
    """The commands that go on from here, as they work in the current folder."""
    where = _relative(config)
    commands = {
        _shown("ask", QUESTION, "--config", where): "",
        _shown("serve", "--config", where): "  # at http://127.0.0.1:8000/v1, until Ctrl-C",
        _shown("registry", "list"): "",
    }
    return "\n".join([f"results: {results}", "next:", *(f"  {command}{note}" for command, note in commands.items())])


def _shown(*words: str) -> str:
    """A `coe` command; with the path of the program where the shell would not find it."""
    program = Path(sys.executable).with_name("coe")
    on_path = shutil.which("coe")
    found = on_path is not None and Path(on_path).resolve() == program.resolve()
    return shlex.join(["coe" if found else _relative(program), *words])


def _relative(path: Path) -> str:
    """The path from the current folder if it is below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
