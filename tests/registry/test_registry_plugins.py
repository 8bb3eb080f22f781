"""Plug-ins: names, `module:Class`, errors, and the modules that a saved router may name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.errors import PluginError, UnknownPlugin
from registry.plugins import Plugins, only_modules

BUILTIN = {"plain": "fractions:Fraction", "direct": int}
PLUGINS = Plugins("coe.tests", "gadget", BUILTIN, needs=("run",))
MODULE = """
class Good:
    def run(self): ...
    class Inner:
        def run(self): ...
class Lacking: ...
number = 3
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the module path, as of installed packages; modules imported from it are removed afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        del sys.modules[name]


def install(site: Path, package: str, *entry_points: str, module: str = MODULE) -> None:
    (site / f"{package}.py").write_text(module)
    info = site / f"{package}-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("\n".join(["[coe.tests]", *entry_points]) + "\n")


def test_built_in_names_load_from_where_they_are():
    from fractions import Fraction

    assert PLUGINS.load("plain") is Fraction
    assert PLUGINS.load("direct") is int
    assert PLUGINS.names() == ("plain", "direct")
    assert "plain" in PLUGINS and "a.b:C" in PLUGINS and "plane" not in PLUGINS and 3 not in PLUGINS


def test_an_entry_point_and_its_class_by_name(site):
    install(site, "gadgets", "good = gadgets:Good", "inner = gadgets:Good.Inner")
    assert "gadgets" not in sys.modules
    assert PLUGINS.names() == ("plain", "direct", "good", "inner") and "good" in PLUGINS
    assert "gadgets" not in sys.modules, "names are listed without an import"
    found = PLUGINS.load("good")
    assert found.__name__ == "Good" and PLUGINS.load("gadgets:Good") is found
    assert PLUGINS.load("inner") is found.Inner and PLUGINS.load("gadgets:Good.Inner") is found.Inner
    assert PLUGINS.name_of(found, "good") == "good"
    assert PLUGINS.name_of(found, "plain") == PLUGINS.name_of(found) == "gadgets:Good"


def test_unknown_names_come_with_those_that_exist(site):
    install(site, "gadgets", "good = gadgets:Good")
    with pytest.raises(UnknownPlugin, match=r"there is no gadget 'goood'; did you mean 'good'\? there are: plain, dir"):
        PLUGINS.load("goood")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gadgets:Lacking", r"gadget 'gadgets:Lacking': the class Lacking has no run; it needs run"),
        (
            "gadgets:Nothing",
            r"cannot be imported: module 'gadgets' has no attribute 'Nothing'",
        ),
        ("gadgets:number", r"gadget 'gadgets:number' is not a class, but int"),
        ("gadgetz:Good", r"there is no module 'gadgetz'; install it, or add its folder to PYTHONPATH"),
        ("gadgets.sub:Good", r"there is no module 'gadgets.sub'"),
        ("needy:Good", r"gadget 'needy:Good' cannot be imported: No module named 'nowhere'"),
        ("broken:Good", r"gadget 'broken:Good' cannot be imported: ValueError: not today"),
        ("gadgets:", r"'gadgets:' is not of the form module:Class"),
        ("a/b:Good", r"'a/b:Good' is not of the form module:Class"),
        ("gadgets:Good()", r"is not of the form module:Class"),
    ],
)
def test_what_cannot_be_used_is_named(site, name, message):
    install(site, "gadgets")
    (site / "broken.py").write_text("raise ValueError('not today')\n")
    (site / "needy.py").write_text("import nowhere\n")
    with pytest.raises(PluginError, match=message):
        PLUGINS.load(name)


def test_an_entry_point_that_cannot_be_imported_names_its_package(site):
    install(site, "gadgets", "bad = gadgets:Nothing", "none = nowhere:Good")
    with pytest.raises(PluginError, match=r"'bad' of the package gadgets 2.0 \(entry point 'gadgets:Nothing' in coe.t"):
        PLUGINS.load("bad")
    with pytest.raises(PluginError, match=r"'none' of the package gadgets 2.0 .*there is no module 'nowhere'"):
        PLUGINS.load("none")


def test_a_name_that_two_give_is_refused(site):
    install(site, "gadgets", "good = gadgets:Good", "plain = gadgets:Good")
    install(site, "widgets", "good = widgets:Good")
    with pytest.raises(PluginError, match="'good' is given by the package (gadgets|widgets) 2.0 and by the package"):
        PLUGINS.load("good")
    with pytest.raises(PluginError, match="'plain' is given by coe itself and by the package gadgets 2.0"):
        PLUGINS.load("plain")
    assert PLUGINS.load("direct") is int and PLUGINS.load("widgets:Good")


def test_a_class_must_derive_from_the_base(site):
    install(site, "gadgets")
    with pytest.raises(PluginError, match="gadget 'gadgets:Good': Good must derive from builtins.dict"):
        Plugins("coe.tests", "gadget", {}, base=dict).load("gadgets:Good")


def test_a_class_inside_a_function_has_no_name():
    class Local:
        def run(self) -> None: ...

    with pytest.raises(PluginError, match=r"Local is defined inside a function.*move it to the top"):
        PLUGINS.name_of(Local, "local")


def test_a_restricted_load_imports_allowed_modules_only(site, monkeypatch):
    install(site, "gadgets", "good = gadgets:Good")
    install(site, "gadgets_more")
    with only_modules(()):
        with pytest.raises(PluginError, match=r"the module 'gadgets' is not imported.*COE_PLUGINS=gadgets in the env"):
            PLUGINS.load("gadgets:Good")
        assert "gadgets" not in sys.modules, "nothing ran"
        assert PLUGINS.load("direct") is int and PLUGINS.load("plain"), "built-in classes load"
        assert PLUGINS.load("good").__name__ == "Good", "entry points load"
    with only_modules(["gadgets"]):
        assert PLUGINS.load("gadgets:Good")
        with pytest.raises(PluginError, match="the module 'gadgets_more' is not imported"):
            PLUGINS.load("gadgets_more:Good")
    monkeypatch.setenv("COE_PLUGINS", "other, gadgets_more")
    with only_modules(()):
        assert PLUGINS.load("gadgets_more:Good")
    monkeypatch.delenv("COE_PLUGINS")
    assert PLUGINS.load("gadgets_more:Good"), "a name that the user wrote is imported"


def test_a_package_allows_what_is_below_it(site):
    (site / "pack").mkdir()
    (site / "pack" / "__init__.py").write_text("")
    (site / "pack" / "deep.py").write_text(MODULE)
    with only_modules(["pack"]):
        assert PLUGINS.load("pack.deep:Good")
    with only_modules(["pack.deeper", "pac"]), pytest.raises(PluginError, match="'pack.deep' is not imported"):
        PLUGINS.load("pack.deep:Good")


@pytest.mark.parametrize("raised", ["SystemExit(3)", "GeneratorExit()", "RuntimeError('broken')"])
def test_whatever_an_import_raises_names_the_plug_in(site, raised):
    install(site, "leaving", module=f"raise {raised}\n")
    with pytest.raises(PluginError, match=rf"gadget 'leaving:Good' cannot be imported: {raised.partition('(')[0]}"):
        PLUGINS.load("leaving:Good")


def test_ctrl_c_during_an_import_stays_ctrl_c(site):
    install(site, "stopped", module="raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        PLUGINS.load("stopped:Good")


def test_an_import_prints_to_stderr(site, capsys):
    install(site, "noisy", module=f"print('imported')\n{MODULE}")
    assert PLUGINS.load("noisy:Good").__name__ == "Good"
    assert capsys.readouterr() == ("", "imported\n")
