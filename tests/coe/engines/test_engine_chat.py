"""Chat templates: precedence, what is refused, and exactly one beginning-of-text token."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from coe.engines.chat import ChatStyle, encode, encode_messages, token_ids
from coe.errors import InvalidRequest, WeightsError
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


def test_messages_go_through_the_tokenizers_template(tokenizer: Any) -> None:
    turns = (Message("system", "short"), Message("user", "is paris?"))
    assert tokenizer.decode(encode_messages(tokenizer, turns)) == (
        "<|im_start|>system\nshort<|im_end|>\n<|im_start|>user\nis paris?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_of_the_adapter_wins(tokenizer: Any) -> None:
    request = GenerateRequest(messages=HI)
    assert (
        tokenizer.decode(encode(tokenizer, request, template="Q: {{ messages[-1].content }}\nA:")) == "Q: the end\nA:"
    )


@pytest.mark.parametrize("template", ["{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"])
def test_one_beginning_of_text_whether_the_template_writes_it_or_not(adding: Any, template: str) -> None:
    assert adding.decode(encode_messages(adding, HI, template=template)) == "<|im_start|>the end"


def test_plain_prompts_have_one_beginning_of_text_where_the_tokenizer_adds_it(tokenizer: Any, adding: Any) -> None:
    def text(of: Any, prompt: str) -> str:
        decoded: str = of.decode(encode(of, GenerateRequest(prompt=prompt)))
        return decoded

    assert text(tokenizer, "the end") == "the end"
    assert text(adding, "the end") == "<|im_start|>the end"
    assert text(adding, "<|im_start|>the end") == "<|im_start|>the end"
    assert text(adding, "<|im_start|><|im_start|>the end") == "<|im_start|>the end"
    other = copy.deepcopy(tokenizer)
    other.bos_token = None
    assert text(other, "the end") == "the end"


def test_messages_without_any_template_are_refused_with_what_to_do(adding: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"'gemma' has no chat template.*plain prompt.*chat_template\.jinja"):
        encode(adding, GenerateRequest(messages=HI), expert="gemma")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages[9].content.x }}",
        "{% if %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_templates_that_refuse_or_break_or_reach_out_are_a_clear_error(tokenizer: Any, template: str) -> None:
    with pytest.raises(InvalidRequest, match="the chat template of 'e' rejects these messages"):
        encode_messages(tokenizer, HI, template=template, expert="e")


def test_an_empty_prompt_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InvalidRequest, match="prompt for 'e' is empty"):
        encode(tokenizer, GenerateRequest(prompt=""), expert="e")


def test_a_folders_style_is_its_template_and_end_token(tmp_path: Path) -> None:
    assert ChatStyle.read(tmp_path) == ChatStyle()
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "in config", "eos_token": {"content": "</s>"}}))
    assert ChatStyle.read(tmp_path) == ChatStyle("in config", ("</s>",))
    (tmp_path / "chat_template.jinja").write_text("in file")
    config.write_text(json.dumps({"chat_template": "in config", "eos_token": "<end>"}))
    assert ChatStyle.read(tmp_path) == ChatStyle("in file", ("<end>",))


def test_only_tokens_that_exist_end_an_answer(tokenizer: Any) -> None:
    assert token_ids(tokenizer, ["<|im_end|>", "<unheard-of>"]) == {tokenizer.eos_token_id}
    assert token_ids(tokenizer, []) == set()


@pytest.mark.parametrize(
    ("content", "match"), [("{", "cannot be read"), ("[]", "not a JSON object"), ('{"chat_template": []}', "one Jinja")]
)
def test_a_style_that_cannot_be_read_is_a_weights_error(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(WeightsError, match=match):
        ChatStyle.read(tmp_path)
