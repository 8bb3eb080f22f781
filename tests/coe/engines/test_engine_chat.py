"""Chat templates: precedence, what is refused, and exactly one beginning-of-text token."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from coe.engines.chat import ChatStyle, check_length, encode, encode_messages, token_ids
from coe.engines.render import Renderer
from coe.errors import InvalidRequest, Rejected, TemplateError, WeightsError
from coe.types import GenerateRequest
from routers.base import Message

HI = (Message("user", "the end"),)


@pytest.fixture
def adding(tokenizer: Any) -> Any:
    """A tokenizer that puts a beginning-of-text token before every text, as Gemma's does; it has no chat template."""
    other = copy.deepcopy(tokenizer)
    bos = other.bos_token
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, other.bos_token_id)]
    )
    other.chat_template = None
    assert other("a")["input_ids"][0] == other.bos_token_id
    return other


def test_messages_go_through_the_tokenizers_template(tokenizer: Any, renderer: Renderer) -> None:
    turns = (Message("system", "short"), Message("user", "is paris?"))
    assert tokenizer.decode(encode_messages(tokenizer, turns, renderer)) == (
        "<|im_start|>system\nshort<|im_end|>\n<|im_start|>user\nis paris?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_of_the_adapter_wins(tokenizer: Any, renderer: Renderer) -> None:
    request = GenerateRequest(messages=HI)
    ids = encode(tokenizer, request, renderer, template="Q: {{ messages[-1].content }}\nA:")
    assert tokenizer.decode(ids) == "Q: the end\nA:"


@pytest.mark.parametrize("template", ["{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"])
def test_one_beginning_of_text_whether_the_template_writes_it_or_not(
    adding: Any, template: str, renderer: Renderer
) -> None:
    assert adding.decode(encode_messages(adding, HI, renderer, template=template)) == "<|im_start|>the end"


def test_plain_prompts_have_one_beginning_of_text_where_the_tokenizer_adds_it(
    tokenizer: Any, adding: Any, renderer: Renderer
) -> None:
    def text(of: Any, prompt: str) -> str:
        decoded: str = of.decode(encode(of, GenerateRequest(prompt=prompt), renderer))
        return decoded

    assert text(tokenizer, "the end") == "the end"
    assert text(adding, "the end") == "<|im_start|>the end"
    assert text(adding, "<|im_start|>the end") == "<|im_start|>the end"
    assert text(adding, "<|im_start|><|im_start|>the end") == "<|im_start|>the end"
    other = copy.deepcopy(tokenizer)
    other.bos_token = None
    assert text(other, "the end") == "the end"


def test_messages_without_any_template_are_refused_with_what_to_do(adding: Any, renderer: Renderer) -> None:
    with pytest.raises(Rejected, match=r"'gemma' has no chat template.*plain prompt.*chat_template\.jinja"):
        encode(adding, GenerateRequest(messages=HI), renderer, expert="gemma")


USER, TURN = Message("user", "hi"), Message("assistant", "ho")
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "why"),
    [
        ("{{ raise_exception('no system role') }}", HI, "no system role"),
        (GEMMA, (Message("system", "short"), USER), "System role not supported"),
        (GEMMA, (USER, USER), "roles must alternate"),
        (GEMMA, (TURN, USER), "roles must alternate"),
        ("{% for m in messages %}{{ {'user': 'U'}[m.role] + m.content }}{% endfor %}", (USER, TURN, USER), "dict"),
        ("{{ messages[0].content + ('' if messages|length < 2 else 1) }}", (USER, TURN, USER), "TypeError"),
    ],
)
def test_a_conversation_that_a_template_does_not_take_is_rejected_by_this_expert(
    tokenizer: Any, renderer: Renderer, template: str, messages: tuple[Message, ...], why: str
) -> None:
    with pytest.raises(Rejected, match=f"the chat template of 'e' rejects these messages: .*{why}") as caught:
        encode_messages(tokenizer, messages, renderer, template=template, expert="e")
    assert isinstance(caught.value, InvalidRequest) and caught.value.status == 400


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ messages[9].content.x }}", "list object has no element 9"),
        ("{% if %}", "line 1: TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError: access to attribute '__class__'"),
        ("{{ messages | no_such_filter }}", "No filter named 'no_such_filter'"),
        ("{{ no_such_function() }}", "'no_such_function' is undefined"),
        ("{% include 'other' %}", "no loader"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_on_every_conversation_is_broken(
    tokenizer: Any, renderer: Renderer, template: str, why: str
) -> None:
    with pytest.raises(TemplateError, match=f"the chat template of 'e' is broken: .*{why}") as caught:
        encode_messages(tokenizer, HI, renderer, template=template, expert="e")
    assert caught.value.status == 500


def test_an_empty_prompt_is_refused(tokenizer: Any, renderer: Renderer) -> None:
    with pytest.raises(Rejected, match="prompt for 'e' is empty"):
        encode(tokenizer, GenerateRequest(prompt=""), renderer, expert="e")


def test_a_folders_style_is_its_template_and_end_token(tmp_path: Path) -> None:
    assert ChatStyle.read(tmp_path) == ChatStyle()
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "in config", "eos_token": {"content": "</s>"}}))
    assert ChatStyle.read(tmp_path) == ChatStyle("in config", ("</s>",))
    (tmp_path / "chat_template.jinja").write_text("in file")
    config.write_text(json.dumps({"chat_template": "in config", "eos_token": "<end>"}))
    assert ChatStyle.read(tmp_path) == ChatStyle("in file", ("<end>",))


NAMED = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]


def test_of_named_templates_the_default_is_used(tmp_path: Path, tokenizer: Any, renderer: Renderer) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": NAMED}))
    assert ChatStyle.read(tmp_path).template == "D"
    config.write_text(json.dumps({"chat_template": {"default": "D", "rag": "R"}}))
    assert ChatStyle.read(tmp_path).template == "D"
    (tmp_path / "chat_template.jinja").write_text("in file")
    extra = tmp_path / "additional_chat_templates"
    extra.mkdir()
    (extra / "rag.jinja").write_text("R")
    assert ChatStyle.read(tmp_path).template == "in file"
    (extra / "default.jinja").write_text("D2")
    assert ChatStyle.read(tmp_path).template == "D2"
    other = copy.deepcopy(tokenizer)
    other.chat_template = {"rag": "R", "default": "D"}
    assert other.decode(encode_messages(other, HI, renderer)) == "D"


@pytest.mark.parametrize("from_files", [False, True])
def test_a_base_with_named_templates(tmp_path: Path, tokenizer: Any, renderer: Renderer, from_files: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("in file")
    if from_files:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    else:
        (tmp_path / "chat_template.jinja").unlink()
        config = tmp_path / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": NAMED}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.decode(encode_messages(loaded, HI, renderer)) == ("in file" if from_files else "D")


def test_named_templates_without_a_default_are_an_error_with_their_names(
    tmp_path: Path, tokenizer: Any, renderer: Renderer
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": NAMED[:1]}))
    with pytest.raises(WeightsError, match="one named 'default'; it has rag"):
        ChatStyle.read(tmp_path)
    other = copy.deepcopy(tokenizer)
    other.chat_template = {"rag": "R", "tool_use": "T"}
    with pytest.raises(TemplateError, match="the tokenizer of 'e' must be one .* it has rag, tool_use"):
        encode_messages(other, HI, renderer, expert="e")


def test_only_tokens_that_exist_end_an_answer(tokenizer: Any) -> None:
    assert token_ids(tokenizer, ["<|im_end|>", "<unheard-of>"]) == {tokenizer.eos_token_id}
    assert token_ids(tokenizer, []) == set()


@pytest.mark.parametrize(
    ("content", "match"),
    [("{", "cannot be read"), ("[]", "not a JSON object"), ('{"chat_template": []}', "one Jinja")]
    + [(json.dumps({"chat_template": odd}), "one Jinja") for odd in (7, [7], [{"name": "default"}], {"default": 7})],
)
def test_a_style_that_cannot_be_read_is_a_weights_error(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(WeightsError, match=match):
        ChatStyle.read(tmp_path)


def test_a_template_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "chat_template.jinja"
    file.write_bytes(b"a" * 2**22)
    template = ChatStyle.read(tmp_path).template
    assert template is not None and len(template) == 2**22
    file.write_bytes(b"a" * (2**22 + 1))
    with pytest.raises(WeightsError, match=r"has 4,194,305 bytes; the most is 4,194,304"):
        ChatStyle.read(tmp_path)


def test_a_text_that_is_much_too_long_is_refused_by_its_start(tokenizer: Any) -> None:
    read: list[int] = []

    def counting(text: str, **options: Any) -> Any:
        read.append(len(text))
        return tokenizer(text, **options)

    check_length(counting, "the end " * 100, 100, expert="sql")  # 800 characters may be 100 tokens
    check_length(counting, " " * 100 + "the end" * 10, 100, expert="sql")
    assert read == []
    with pytest.raises(Rejected, match="a text of 1,000,000 characters has more tokens than the 100 that 'sql' reads"):
        check_length(counting, "x?" * 500_000, 100, expert="sql")
    assert read == [928]


def test_a_long_text_of_few_tokens_is_not_refused() -> None:
    check_length(lambda text, **_: {"input_ids": [0] * (len(text) // 16)}, " " * 1600, 100, expert="sql")
    with pytest.raises(Rejected):
        check_length(lambda text, **_: {"input_ids": [0] * (len(text) // 4)}, " " * 1600, 100, expert="sql")
