"""An external package adds a router, an engine, a composition and a grader; all four are used end to end.

Installed, they are named by entry points; if only importable, by `module:Class`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from coe import ConfigError, TaskError, build_composition, create_engine, load_config, load_task
from routers import InvalidSettings, UnknownRouterKind, build

PACKAGE = Path(__file__).parent / "plugin_package"
SHORT = ["one two three", "red green blue", "north south east", "do re mi"]
LONG = [f"{text} and then some more words to read" for text in SHORT]
ANSWERS = """
import asyncio, json, sys
from coe import open_local

async def main():
    async with open_local(sys.argv[1]) as system:
        said = {}
        for model in ("coe/composed", "coe/routed"):
            for text in ("sun moon stars", "sun moon stars and all that is far beyond them"):
                said[f"{model} {len(text.split())}"] = await system.ask(text, model=model)
        print(json.dumps(said))

asyncio.run(main())
"""


@dataclass(frozen=True)
class Names:
    """The names of the four plug-ins, and what makes them importable."""

    router: str
    engine: str
    composition: str
    grader: str
    path: Path

    @property
    def by_class(self) -> bool:
        return ":" in self.router


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, installed offline into an empty folder: modules and metadata."""
    folder = tmp_path_factory.mktemp("installed")
    source = Path(shutil.copytree(PACKAGE, folder / "source"))  # building leaves files beside the source
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(folder / "site"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "site" / "coe_example_plugin-1.2.0.dist-info" / "entry_points.txt").is_file()
    return folder / "site"


@pytest.fixture(params=["entry points", "module:Class"])
def names(request: pytest.FixtureRequest) -> Names:
    if request.param == "entry points":
        return Names("by-length", "reverse", "longest", "first-word", request.getfixturevalue("installed"))
    package = "example_plugin"
    return Names(
        f"{package}.router:ByLength",
        f"{package}.engine:ReverseEngine",
        f"{package}.composition:Longest",
        f"{package}.grader:FirstWord",
        PACKAGE,
    )


def run(names: Names, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(names.path), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    return subprocess.run([sys.executable, *command], env=variables, capture_output=True, text=True, check=False)


def coe(names: Names, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(names, "-c", "from coe.cli.entry import main; main()", *arguments, **environment)


def write(folder: Path, names: Names) -> Path:
    """Experts, a task whose short questions the plug-in's engine answers, and a configuration."""
    experts = [
        {"name": "backwards", "kind": "model", "source": "reverse://words", "engine": names.engine},
        {"name": "echo", "kind": "model", "source": "fake://echo"},
        {"name": "loud", "kind": "model", "source": "fake://upper"},
    ]
    (folder / "experts.yaml").write_text(json.dumps({"experts": experts}))
    rows = [{"id": f"s{i}", "prompt": text, "answer": text.split()[-1]} for i, text in enumerate(SHORT)]
    rows += [{"id": f"l{i}", "prompt": text, "answer": text.split()[0]} for i, text in enumerate(LONG)]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"grader": names.grader, "grader_options": {"ignore_case": False}}
    (folder / "words.yaml").write_text(json.dumps({"name": "words", "data": "words.jsonl", **options}))
    router = {"router": "router", "plugins": ["example_plugin"]} if names.by_class else {"router": "router"}
    config = {
        "experts": ["experts.yaml"],
        "engines": {names.engine: {"suffix": " !"}},
        "default_policy": "routed",
        "policies": {
            "routed": router,
            "composed": {**router, "k": 2, "composition": {"kind": names.composition, "least": 1}},
        },
    }
    (folder / "service.yaml").write_text(json.dumps(config))
    return folder / "service.yaml"


@pytest.mark.integration
def test_all_four_work_end_to_end(tmp_path: Path, names: Names) -> None:
    config = write(tmp_path, names)
    plain = tmp_path / "plain.yaml"
    plain.write_text(json.dumps({"experts": ["experts.yaml"]}))
    evaluated = coe(
        names, "eval", "-c", str(plain), "--tasks", str(tmp_path / "words.yaml"), "-o", str(tmp_path / "run"),
        "--json", "-",
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    router = tmp_path / "router"
    outcomes = str(tmp_path / "run" / "outcomes.parquet")
    trained = coe(
        names, "router", "train", "--outcomes", outcomes, "--kind", names.router, "--set", "words=4",
        "--out", str(router), "--json", "-",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    document = json.loads((router / "router.json").read_text())
    assert document["kind"] == names.router and document["settings"]["words"] == 4

    scored = coe(
        names, "router", "eval", str(router), "--outcomes", outcomes, "--json", "-", COE_PLUGINS="example_plugin.router"
    )
    assert scored.returncode == 0, scored.stderr
    [row] = json.loads(scored.stdout)
    assert row["accuracy"] == 1.0 and row["best_single"] == 0.5, "short ones to backwards, long ones to echo"

    answered = run(names, "-c", ANSWERS, str(config))
    assert answered.returncode == 0, answered.stderr
    long = "sun moon stars and all that is far beyond them"
    assert json.loads(answered.stdout) == {
        "coe/routed 3": "stars moon sun !",
        "coe/routed 10": long,
        "coe/composed 3": "stars moon sun !",  # the longest of two: the suffix of its section makes it so
        "coe/composed 10": " ".join(reversed(long.split())) + " !",
    }


@pytest.mark.integration
def test_a_saved_router_imports_no_module_that_the_user_has_not_allowed(tmp_path: Path) -> None:
    """The error names the module and how to allow it."""
    names = Names("example_plugin.router:ByLength", "", "", "", PACKAGE)
    rows = ["query_id,prompt,score::a,score::b", "1,one two,1,0", "2,one two three four five,0,1"]
    (tmp_path / "outcomes.csv").write_text("\n".join(rows))
    common = ["--outcomes", str(tmp_path / "outcomes.csv")]
    trained = coe(
        names, "router", "train", *common, "--kind", names.router, "--set", "words=3", "--out", str(tmp_path / "r")
    )
    assert trained.returncode == 0, trained.stderr
    refused = coe(names, "router", "eval", str(tmp_path / "r"), *common)
    assert refused.returncode == 1
    assert "COE_PLUGINS=example_plugin.router" in refused.stderr and "Traceback" not in refused.stderr
    shown = coe(names, "route", "one two", "--router", str(tmp_path / "r"), "--json", "-", COE_PLUGINS="example_plugin")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["experts"][0] == "a"


def test_mistyped_names_get_a_suggestion(tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(installed))
    with pytest.raises(UnknownRouterKind, match=r"no router kind 'by-lenght'; did you mean 'by-length'\?"):
        build("by-lenght")
    with pytest.raises(ConfigError, match=r"no engine 'revers'; did you mean 'reverse'\?"):
        create_engine("revers")
    with pytest.raises(ConfigError, match=r"no composition 'longst'; did you mean 'longest'\?"):
        build_composition("longst")
    names = Names("by-length", "revers", "longest", "first-wrd", installed)
    config = write(tmp_path, names)
    with pytest.raises(ConfigError, match=r"engines.revers: is not a known field"):
        load_config(config)
    with pytest.raises(TaskError, match=r"words.yaml:1: grader: there is no grader 'first-wrd'; did you mean 'first-w"):
        load_task(tmp_path / "words.yaml")


def test_settings_are_checked_by_the_classes(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(installed))
    with pytest.raises(InvalidSettings, match=r"a by-length router has no setting 'word'; did you mean 'words'\?"):
        build("by-length", settings={"word": 3})
    with pytest.raises(InvalidSettings, match="setting words='many' of a by-length router: Input should be a valid"):
        build("by-length", settings={"words": "many"})
    with pytest.raises(ConfigError, match="engine 'reverse' cannot be created with .*'sufix'"):
        create_engine("reverse", sufix="!")
    with pytest.raises(ConfigError, match="composition 'longest' has no setting most; it has: least"):
        build_composition("longest", {"most": 3})
