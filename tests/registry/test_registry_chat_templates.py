"""Experts whose chat template renders tools have the capability `tools`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from model_files import write_adapter, write_json, write_model

from registry.chat_templates import renders_tools
from registry.describe import describe
from registry.errors import SourceError
from registry.spec import ExpertSpec, Kind

PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
WITH_TOOLS = "{%- if tools %}{{ tools | tojson }}{% endif %}" + PLAIN


@pytest.mark.parametrize(
    ("template", "renders"),
    [
        (WITH_TOOLS, True),
        ("{% for tool in tools %}{{ tool }}{% endfor %}", True),
        ("{% if tools is not none and x %}{% endif %}", True),
        (PLAIN, False),
        ("{# tools are not supported #}You have no tools. {{ m.tools }}{{ 'tools' }}{{ my_tools }}", False),
        ("{%" * 200_000, False),
        ("{#" * 200_000, False),
    ],
)
def test_a_template_that_reads_the_variable_renders_tools(tmp_path: Path, template: str, renders: bool) -> None:
    (tmp_path / "chat_template.jinja").write_text(template)
    assert renders_tools(tmp_path) is renders


@pytest.mark.parametrize(
    ("stated", "renders"),
    [
        (WITH_TOOLS, True),
        ([{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": WITH_TOOLS}], True),
        ({"default": PLAIN, "tool_use": WITH_TOOLS}, True),
        ([{"name": "default", "template": PLAIN}, {"name": "rag", "template": WITH_TOOLS}], False),
        ([1, {"name": "default"}, "x"], None),
        (None, None),
    ],
)
def test_templates_in_the_tokenizers_config(tmp_path: Path, stated: Any, renders: bool | None) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": stated})
    assert renders_tools(tmp_path) is renders


def test_a_template_of_its_own_file_and_one_that_is_too_large(tmp_path: Path) -> None:
    assert renders_tools(tmp_path) is None
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(WITH_TOOLS)
    assert renders_tools(tmp_path) is True
    (tmp_path / "chat_template.jinja").write_text("x" * (2**22 + 1))
    with pytest.raises(SourceError, match="4,194,305 bytes"):
        renders_tools(tmp_path)


def test_experts_get_the_capability_and_adapters_that_of_their_base(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base")
    plain = described(folder)
    (folder / "chat_template.jinja").write_text(WITH_TOOLS)
    base = described(folder)
    assert (plain.capabilities, base.capabilities) == ({"chat"}, {"chat", "tools"})
    assert described(folder, capabilities=frozenset({"chat", "json"})).capabilities == {"chat", "json", "tools"}
    adapter = write_adapter(tmp_path / "adapter")
    assert described(adapter, base).capabilities == {"chat", "tools"}
    assert described(adapter, plain).capabilities == {"chat"}
    (adapter / "chat_template.jinja").write_text(PLAIN)
    assert described(adapter, base).capabilities == {"chat"}


def test_parsers_state_the_capability(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base")
    base = described(folder, tool_call_parser="hermes", reasoning_parser="qwen3")
    assert base.capabilities == {"chat", "tools", "reasoning"}
    adapter = write_adapter(tmp_path / "adapter")
    assert described(adapter, base).capabilities == {"chat", "tools", "reasoning"}
    (adapter / "chat_template.jinja").write_text(PLAIN)
    assert described(adapter, base).capabilities == {"chat", "reasoning"}
    assert described(adapter, base, tool_call_parser="hermes").capabilities == {"chat", "tools", "reasoning"}


def described(folder: Path, base: ExpertSpec | None = None, **fields: Any) -> ExpertSpec:
    kind, of = (Kind.MODEL, {}) if base is None else (Kind.ADAPTER, {"base": "base"})
    name = "base" if base is None else "adapter"
    return describe(ExpertSpec(**{"name": name, "kind": kind, "source": str(folder)} | of | fields), base)
