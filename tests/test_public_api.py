"""The public API: its names are pinned here, so that none is added or removed by accident."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

PUBLIC = {
    "coe": """
        Abstained Adapter Answer BudgetExceeded COMPOSITIONS Capabilities Chunk CoeError Composition CompositionConfig
        CompositionError Config ConfigError ContextLengthExceeded DeadlineExceeded Done ENGINES Engine EngineError
        Expert ExpertCall ExpertCalls ExpertDrained Failure Final GRADERS GenerateRequest GoldError Grader GraderModel
        Host HostLost InUse InvalidRequest LoadFailing LoadingEngine Message NotAllowed NotServedHere Orchestrator
        OutOfMemory Overloaded Policy PolicyConfig PolicyUnavailable Query Rejected RemoteError Reply RoutingFailed
        SamplingOptions Scope ShapeKey Single Slot SlotEngine System Task TaskError TemplateError Timing TokenLogprob
        ToolCallDelta UnknownModel Unsupported Usage Wants WeightsError __version__ build_composition create_engine
        load_config load_task open_host open_local replay_composition
    """,
    "routers": """
        ArtifactMeta BaselineLeftOut CachedEncoder Cascade Choosing Comparison Dynamic EmbeddingRouter Encoder
        EncoderInfo Estimate EvaluatingOnTrainingData FittedRouter HashingEncoder InvalidArtifact InvalidEncoder
        InvalidOutcomes InvalidSettings KINDS LoadedRouter MeetBudget Message NoEligibleExpert OutcomeTable Query
        Recruit Router RouterError RouterReport RouterState RoutingDecision SaveCost Selector StaleArtifactWarning
        ToolCall TopK TrainableRouter UnknownRouterKind Updatable Utility add_expert add_rows build build_encoder
        build_selector cascade_for_cost check_dim compare cross_validate cross_validate_all decide draw_reports
        dynamic_for_calls embed evaluate import_csv load read_prices remove_expert router_class save settings_of
        standard_baselines stratified_folds
    """,
    "registry": """
        DigestMismatch DiskFull Document ExpertSpec FileRecord InvalidSpec Kind Measure PlannedChange PluginError
        Plugins Price Problem ProfileRow Registry RegistryError RegistryPlan Snapshot SourceError SourceKind StaleChange
        StoreError TargetError UnknownExpert UnknownPlugin apply coe_home identity load_document only_modules plan
        validate
    """,
}


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_are_these(package: str) -> None:
    module = import_module(package)
    assert sorted(module.__all__) == sorted(PUBLIC[package].split())
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        value = getattr(module, name)
        assert not inspect.ismodule(value), f"{package}.{name} is a module: rename one of the two"
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{package}.{name} has no docstring"


@pytest.mark.parametrize("package", PUBLIC)
def test_every_error_and_warning_is_public(package: str) -> None:
    module, errors = import_module(package), import_module(f"{package}.errors")
    own = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert own <= set(module.__all__)


@pytest.mark.parametrize("package", PUBLIC)
def test_the_docstring_names_every_room(package: str) -> None:
    module = import_module(package)
    words = set(re.findall(r"\w+", inspect.getdoc(module) or ""))
    rooms = {found.name for found in pkgutil.iter_modules(module.__path__)} - {"version"}
    assert rooms <= words, f"{package}/__init__.py does not say what these are for: {sorted(rooms - words)}"


@pytest.mark.parametrize("package", PUBLIC)
def test_type_checkers_see_the_same_objects(package: str) -> None:
    """A name imported for type checking is the object of the attribute at run time."""
    module = import_module(package)
    [typed] = [
        node
        for node in ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    seen = {
        alias.name: getattr(import_module(str(node.module)), alias.name)
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen.keys() == set(module.__all__) - {"__version__"}
    assert all(getattr(module, name) is value for name, value in seen.items())
    assert (Path(module.__file__ or "").parent / "py.typed").is_file()


@pytest.mark.parametrize(("package", "name"), [("routers", "build"), ("routers", "decide"), ("registry", "apply")])
def test_a_name_is_the_same_whatever_was_imported_before(package: str, name: str) -> None:
    modules = f"pkgutil.iter_modules({package}.__path__, '{package}.')"
    everything = f"import pkgutil, importlib; [importlib.import_module(module.name) for module in {modules}]"
    for before in ("", everything):
        code = f"import {package}\n{before}\nfrom {package} import {name}\nprint(callable({name}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "True\n"


def test_an_unknown_name_is_an_import_error() -> None:
    import routers

    with pytest.raises(AttributeError, match="module 'routers' has no attribute 'Qeury'"):
        routers.Qeury  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Qeury' from 'routers'"):
        exec("from routers import Qeury")
