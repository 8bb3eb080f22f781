"""The documentation: the site builds strictly, and what its blocks name exists: commands, options, modules, YAML."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from coe.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
ids = [str(path.relative_to(ROOT)) for path in PAGES]


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each code block; those that are indented have no language."""
    language, lines = None, []
    for line in path.read_text(encoding="utf-8").splitlines():
        if (fence := re.match(r"\s*```(\w*)", line)) is not None:
            if language is None:
                language, lines = fence[1], []
            else:
                yield language, "\n".join(lines)
                language = None
        elif language is not None:
            lines.append(line)
        elif line.startswith("    "):
            yield "", line


def lines(path: Path) -> Iterator[list[str]]:
    """The words of each line of shell, without what is before and after the command."""
    for language, text in blocks(path):
        if language not in ("", "bash", "sh", "console"):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s(?:\||&&|;|&)\s", line.strip().removeprefix("$ ")):
                try:
                    words = shlex.split(part, comments=True)
                except ValueError:  # no shell
                    continue
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words = words[1:]
                if words:
                    yield words


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words call, and the words after its name."""
    command, rest = typer.main.get_command(app), words[1:]
    while (below := getattr(command, "commands", None)) and rest and rest[0] in below:
        command, rest = below[rest[0]], rest[1:]
    return command, rest


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_commands_and_their_options_exist(path: Path) -> None:
    for words in lines(path):
        if words[0] != "coe" or len(words) == 1 or words[1].startswith(("(", "-", ".")):
            continue
        command, rest = command_of(words)
        known = {option for each in command.params for option in each.opts} | {"--help", "-h"}
        assert not getattr(command, "commands", None) or not rest or rest[0].startswith("-"), f"no command: {words}"
        for word in rest:
            if re.match(r"--?[a-z]", word):
                assert word.partition("=")[0] in known, f"{' '.join(words)}: no option {word}"


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_programs_exist(path: Path) -> None:
    for words in lines(path):
        if Path(words[0]).name not in ("python", "python3") or len(words) < 2:
            continue
        if words[1] == "-m":
            if words[2].split(".")[0] in ("coe", "routers", "registry", "examples", "benchmarks", "tests"):
                assert importlib.util.find_spec(words[2]) is not None, words
        elif words[1].endswith(".py") and "/" in words[1]:
            assert (ROOT / words[1]).is_file(), words


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_yaml_can_be_read(path: Path) -> None:
    for language, text in blocks(path):
        if language in ("yaml", "yml"):
            assert yaml.safe_load(text) is not None


@pytest.mark.integration
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "commands.html").read_text(encoding="utf-8")
    assert 'id="coe-router-train"' in page and "--cost-weight" in page
    assert 'id="registry.Registry"' in (tmp_path / "site" / "api" / "registry.html").read_text(encoding="utf-8")
    loaded = [
        (path.name, found)
        for path in (tmp_path / "site").rglob("*.html")
        for found in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', path.read_text("utf-8"))
    ]
    assert not loaded, "a page loads something from elsewhere"


def test_every_error_of_the_api_is_explained() -> None:
    from coe.errors import CoeError
    from coe.serve.batches import errors
    from coe.serve.http import api, refusals

    def below(kind: type[CoeError]) -> Iterator[type[CoeError]]:
        yield kind
        for each in kind.__subclasses__():
            yield from below(each)

    assert api.build_api  # imports all endpoints
    assert {refusals.Full, errors.StorageFull} <= set(below(CoeError))
    table = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", table, re.M))
    # Others are of commands, which other tests may have imported.
    sent = ("coe.errors", "coe.serve.http", "coe.serve.batches", "coe.protocol")
    codes = {each.code: str(each.status) for each in below(CoeError) if each.__module__.startswith(sent)}
    assert {code: rows.get(code) for code in codes if code != CoeError.code} == {
        code: status for code, status in codes.items() if code != CoeError.code
    }
