"""Importing the packages, or `--help`, loads no heavy library, so that start-up stays fast."""

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "transformers",
    "sklearn",
    "scipy",
    "pandas",
    "pyarrow",
    "matplotlib",
    "ray",
    "vllm",
    "openai",
    "peft",
    "sentence_transformers",
)


@pytest.mark.parametrize(
    "code",
    [
        "import coe, routers, registry",
        "from routers import Query, build, decide",
        "from coe import GenerateRequest, Composition, Engine, open_local",
        "from registry import ExpertSpec, Registry, apply, plan",
        "import registry.store, registry.spec, registry.reconcile",
        "import routers.base, routers.factory",
        "import coe.orchestrator, coe.scheduler, coe.memory, coe.config",
        "import coe.cli.app",
    ],
)
def test_imports_stay_light(code: str) -> None:
    check = f"import sys; {code}; print(sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
