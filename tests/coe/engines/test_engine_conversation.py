"""What chat templates read: whole messages, tools, reasoning, and the caller's variables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coe.engines.chat import ChatStyle, render
from coe.engines.conversation import template_variables
from coe.engines.render import Renderer
from coe.errors import Rejected, TemplateError
from coe.types import GenerateRequest
from routers.base import Message, ToolCall

TOOL = {"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}
CALL = ToolCall("call_0123456789abcdef01234567", "w", '{"n": 1}')
HISTORY = (
    Message("user", "Weather?"),
    Message("assistant", "", (CALL,), reasoning="Look it up."),
    Message("tool", "sunny", tool_call_id=CALL.id),
)
ECHO = "{{ messages | tojson }}|{{ tools | tojson }}|{{ enable_thinking | default('unset') }}"


def request(messages: tuple[Message, ...] = HISTORY, **fields: Any) -> GenerateRequest:
    return GenerateRequest(messages, **{"tools": (TOOL,)} | fields)


def test_messages_are_those_that_templates_expect() -> None:
    user, assistant, tool = template_variables(request(), {})["messages"]
    assert user == {"role": "user", "content": "Weather?"}
    assert assistant["tool_calls"][0]["function"] == {"name": "w", "arguments": {"n": 1}}
    assert (assistant["content"], assistant["reasoning_content"]) == ("", "Look it up.")
    assert tool == {"role": "tool", "content": "sunny", "tool_call_id": CALL.id, "name": "w"}


def test_templates_of_mistral_get_ids_of_nine_characters_and_harmony_gets_thinking() -> None:
    _, assistant, tool = template_variables(request(), {}, answers="mistral")["messages"]
    assert assistant["tool_calls"][0]["id"] == tool["tool_call_id"] == "f01234567"
    short = template_variables(request((Message("tool", "", tool_call_id="a-1"),)), {}, answers="mistral")
    assert short["messages"][0]["tool_call_id"] == "0000000a1"
    assert template_variables(request(), {}, answers="harmony")["messages"][1]["thinking"] == "Look it up."


SINGLE = (
    '{# <|start_header_id|> "parameters" #}{% for m in messages %}{% if m.tool_calls and m.tool_calls | length != 1 %}'
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}{{ m.role[0] }}"
    "{% for c in m.tool_calls or [] %}:{{ c.id }}{% endfor %}"
    "{% if m.tool_call_id %}={{ m.tool_call_id }}{% endif %}{{ m.content }} {% endfor %}"
)


def test_templates_of_llama_get_one_call_a_message_with_its_results(tokenizer: Any, renderer: Renderer) -> None:
    calls = tuple(ToolCall(name, "w", "{}") for name in ("1", "2", "2", "3"))
    results = (Message("tool", "b", tool_call_id="2"), Message("tool", "a", tool_call_id="1"))
    lost = Message("tool", "x", tool_call_id="9")
    history = (
        Message("user", "?"),
        Message("assistant", "hm", calls, reasoning="so"),
        *results,
        lost,
        Message("user", "!"),
    )
    rendered = render(tokenizer, request(history), renderer, ChatStyle(SINGLE)).result()
    assert rendered == "u? a:1hm t=1a a:2 t=2b a:2 a:3 t=9x u! "
    assert "reasoning_content" not in template_variables(request(history), {}, answers="llama3")["messages"][3]
    [whole] = [m for m in template_variables(request(history), {}, answers="hermes")["messages"] if "tool_calls" in m]
    assert len(whole["tool_calls"]) == 4


def deep(n: int) -> str:
    return '{"a":' * n + "1" + "}" * n


@pytest.mark.parametrize("arguments", ["{broken", "[1]", '"text"', deep(100), deep(5000)])
def test_arguments_that_are_no_object_stay_text(arguments: str) -> None:
    history = (Message("assistant", "", (ToolCall("i", "w", arguments),)),)
    [document] = template_variables(request(history), {})["messages"]
    assert document["tool_calls"][0]["function"]["arguments"] == arguments


def test_variables_of_the_caller_replace_no_others() -> None:
    own = {"enable_thinking": False, "messages": [], "tools": [], "add_generation_prompt": False, "bos_token": "x"}
    found = template_variables(
        request(template_kwargs={**own, "custom": 1}, reasoning_effort="high"), {"bos_token": "<s>"}
    )
    assert (found["bos_token"], found["add_generation_prompt"], found["tools"]) == ("<s>", True, [TOOL])
    assert (found["reasoning_effort"], found["enable_thinking"], found["thinking"]) == ("high", False, True)
    assert len(found["messages"]) == 3 and found["custom"] == 1 and found["documents"] is None


def test_effort_none_turns_reasoning_off_and_no_effort_sets_nothing() -> None:
    off = template_variables(request(reasoning_effort="none"), {})
    assert (off["enable_thinking"], off["thinking"]) == (False, False)
    assert not {"enable_thinking", "thinking", "reasoning_effort"} & template_variables(request(), {}).keys()


def test_tools_are_rendered_only_if_the_model_may_call_them(tokenizer: Any, renderer: Renderer) -> None:
    style = ChatStyle(ECHO, tool_template="with tools: " + ECHO)
    text = render(tokenizer, request(template_kwargs={"enable_thinking": True}), renderer, style).result()
    assert text.startswith("with tools: [{")
    assert json.loads(text.split("|")[1]) == [TOOL] and text.endswith("|True")
    for fields in ({"tools": ()}, {"tool_choice": "none"}):
        text = render(tokenizer, request(**fields), renderer, style).result()
        assert text.startswith("[{") and text.endswith("|null|unset")


def test_the_template_named_tool_use_is_read_beside_the_default(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named, "response_template": {"a": 1}}))
    style = ChatStyle.read(tmp_path)
    assert (style.template, style.tool_template, style.response_template) == ("d", "t", {"a": 1})
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("file")
    assert ChatStyle.read(tmp_path).tool_template == "file"


def test_an_adapter_without_a_template_has_that_of_its_base(tokenizer: Any) -> None:
    tokenizer = type("T", (), {"chat_template": {"default": "d", "tool_use": "t"}, "response_template": None})()
    style = ChatStyle(eos=("x",)).on(tokenizer)
    assert (style.template_for(request()), style.template_for(request(tools=())), style.eos) == ("t", "d", ("x",))
    own = ChatStyle("own").on(tokenizer)
    assert own.template_for(request()) == "own"


def test_tools_count_for_the_limits_of_rendering(tokenizer: Any, renderer: Renderer) -> None:
    long = {"type": "function", "function": {"name": "w", "description": "x" * 300_000}}
    text = render(tokenizer, request(tools=(long,)), renderer, ChatStyle("{{ tools | tojson(indent=4) }}")).result()
    assert len(text) > 300_000
    parameters = {str(i): json.loads(deep(50)) for i in range(200)}
    wide = {"type": "function", "function": {"name": "w", "parameters": parameters}}
    rendered = render(tokenizer, request(tools=(wide,)), renderer, ChatStyle("{{ tools | tojson(indent=4) }}")).result()
    assert json.loads(rendered) == [wide]


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ tools[0].function.parameters.properties.items() | list }}", Rejected),  # of these tools only
        ("{% if tools %}{{ tools[0].function.description + 1 }}{% endif %}", TemplateError),  # of all tools
    ],
)
def test_tools_that_a_template_does_not_take_are_rejected(
    tokenizer: Any, renderer: Renderer, template: str, error: type[Exception]
) -> None:
    tool = {"type": "function", "function": {"name": "w", "description": "d", "parameters": {"properties": "broken"}}}
    with pytest.raises(error):
        render(tokenizer, request(tools=(tool,)), renderer, ChatStyle(template), expert="e").result()
