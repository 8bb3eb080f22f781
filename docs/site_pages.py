"""Pages of the documentation site that are not files of docs/: see mkdocs.yml.

The README and the other texts of the repository become pages; the Python interface and the commands are written from
the code. Links to files of the repository that are no pages are shown as their paths.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any, Final

from mkdocs.structure.files import File, Files

ROOT: Final = Path(__file__).parent.parent
TEXTS: Final = {
    "index.md": "README.md",
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
PACKAGES: Final = ("coe", "routers", "registry")
_LINK: Final = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?://|#)([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    for page, name in TEXTS.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for package in PACKAGES:
        files.append(File.generated(config, f"api/{package}.md", content=interface(package)))
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Make links of the repository links of the site."""
    written_in = Path(TEXTS.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent
    here = Path(page.file.src_uri).parent

    def replaced(found: re.Match[str]) -> str:
        text, target = found.groups()
        path, _, anchor = target.partition("#")
        there = _normal(written_in / path)
        uri = next((page for page, name in TEXTS.items() if name == there), there.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            return text if f"`{there}`" in text or there in text else f"{text} (`{there}`)"
        up = "../" * len(here.parts)
        return f"[{text}]({up}{uri}{'#' + anchor if anchor else ''})"

    return _LINK.sub(replaced, markdown)


def interface(package: str) -> str:
    """The public names of a package, as mkdocstrings documents them."""
    module = importlib.import_module(package)
    summary = (module.__doc__ or "").strip().splitlines()[0]
    names = "\n\n".join(f"::: {package}.{name}" for name in module.__all__)
    return f"# {package}\n\n{summary}\n\n{names}\n"


def commands() -> str:
    """The help of every command."""
    import typer

    from coe.cli.app import app

    return "# Commands\n\n" + "\n".join(_help(typer.main.get_command(app), "coe", 2))


def _help(command: Any, name: str, level: int) -> list[str]:
    lines = [f"{'#' * level} {name}", "", (command.help or "").strip().replace("\b", ""), ""]
    options = [each for each in command.params if not getattr(each, "hidden", False)]
    rows = [_row(each) for each in options if "--help" not in each.opts]
    if rows and name != "coe":
        lines += ["| argument or option | |", "|---|---|", *rows, ""]
    for sub in getattr(command, "commands", {}).values():
        lines += _help(sub, f"{name} {sub.name}", min(level + 1, 4))
    return lines


def _row(parameter: Any) -> str:
    metavar, text = parameter.metavar or "", " ".join((getattr(parameter, "help", None) or "").split())
    if parameter.param_type_name != "option":
        said = f"`{metavar}`"
    else:
        said = ", ".join(f"`{each}`" for each in parameter.opts)
        said += "" if getattr(parameter, "is_flag", False) or not metavar else f" `{metavar}`"
    return f"| {said} | {text} |".replace("PATH|-", "PATH\\|-").replace("|GGUF|REPO|URL", "\\|GGUF\\|REPO\\|URL")


def _normal(path: Path) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts:
            parts.pop()
        elif part not in (".", ".."):
            parts.append(part)
    return "/".join(parts)
