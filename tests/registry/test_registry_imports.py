from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = ["spec", "errors", "storage", "documents", "store", "sources", "describe", "digest", "reconcile"]


@pytest.mark.parametrize("modules", [["registry"], [f"registry.{name}" for name in LIGHT]], ids=["package", "modules"])
def test_the_registry_is_light(modules: list[str]) -> None:
    heavy = (
        "{'torch', 'transformers', 'pandas', 'ray', 'vllm', 'huggingface_hub', 'gguf', 'numpy', 'sklearn', 'alembic'}"
    )
    script = f"import sys, {', '.join(modules)}\nprint(*sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
