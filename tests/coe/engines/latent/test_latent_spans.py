"""Which characters tokens stand for, against a loop over characters; what templates write after a text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine_models import CHATML, make_tokenizer

from coe.engines.chat import encode_text
from coe.engines.latent.spans import Turns, UserText, no_spans
from coe.engines.render import Renderer
from coe.errors import Rejected, TemplateError
from coe.types import GenerateRequest
from routers.base import Message

GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TEXTS = {
    "plain": "the capital of france",
    "emoji": "paris 👩‍👩‍👧‍👦 is 🇫🇷 the end",
    "combining marks": "cafe\u0301 de\u0301ja\u0300 vu",
    "CRLF": "the end\r\nof\r\n\r\nthe answer",
    "spaces": "the    end  of\tthe ",
    "non-Latin": "答案は東京です。",
    "one character": "a",
    "the words of the template": "user\n<|im_start|>assistant",
}


def sentencepiece_tokenizer() -> Any:
    """Pieces with their leading space, and bytes for characters that are no piece, as Llama 2 and Gemma have."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    pieces += sorted(set("the capital of france is paris end answer deja vu cafe user assistant\n<|_>"))
    words = ["▁t", "▁th", "▁the", "▁c", "▁e", "en", "an", "▁o", "▁of", "▁p", "pa", "▁▁"]
    pairs = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c"), ("▁", "e"), ("e", "n"), ("a", "n"), ("▁", "o")]
    pairs += [("▁o", "f"), ("▁", "p"), ("p", "a"), ("▁", "▁")]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *words]))}
    raw = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = GEMMA
    return tokenizer


TOKENIZERS = {"bytes": make_tokenizer(), "pieces": sentencepiece_tokenizer()}


def _request(text: str, *before: Message) -> GenerateRequest:
    return GenerateRequest(messages=(*before, Message("user", text)))


def _turns(template: str, renderer: Renderer, tokenizer: Any, **variables: Any) -> Turns:
    request = GenerateRequest(messages=(Message("user", "x"),), template_kwargs=variables)
    return Turns.read(template, request, tokenizer.special_tokens_map, renderer, expert="tiny")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_spans_are_those_of_a_loop_over_characters(kind: str, text: str, renderer: Renderer) -> None:
    """Two tokens overlap where a character of the text belongs to both: checked for the tokens of two renderings."""
    tokenizer = TOKENIZERS[kind]
    template = tokenizer.chat_template
    turns = _turns(template, renderer, tokenizer)
    shown = text.strip() if template is GEMMA else text
    head = "<s><start_of_turn>user\n" if template is GEMMA else "<|im_start|>user\n"
    rendered = head + shown + turns.after_user
    found = UserText.find(rendered, _request(text), turns)
    assert found is not None
    assert (rendered[found.start : found.end], found.shift) == (shown, text.index(shown))
    ids = encode_text(tokenizer, rendered)
    spans = found.spans(tokenizer, rendered, len(ids))
    plain = UserText.find(text, GenerateRequest(prompt=text))
    assert plain is not None
    raw = encode_text(tokenizer, text)
    own = plain.spans(tokenizer, text, len(raw))
    characters = _characters(tokenizer, rendered, len(ids))
    expected = [{c - len(head) + text.index(shown) for c in each if _in_text(c, head, shown)} for each in characters]
    assert [set(range(*span)) if span[0] >= 0 else set() for span in spans.tolist()] == expected
    assert any(expected)
    # The formula of the reader: spans overlap if each starts before the other ends.
    mine, theirs = own[:, None], spans[None]
    overlap = (mine[..., 0] < theirs[..., 1]) & (theirs[..., 0] < mine[..., 1]) & (mine[..., 0] >= 0)
    whole = _characters(tokenizer, text, len(raw))
    assert overlap.tolist() == [[bool(a & b) for b in expected] for a in whole]


def _in_text(place: int, head: str, text: str) -> bool:
    return len(head) <= place < len(head) + len(text)


def _characters(tokenizer: Any, text: str, n_tokens: int) -> list[set[int]]:
    """The characters of each token, found one character after the other by the tokenizer's own lookup."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    n_found = len(found["input_ids"])
    places: list[set[int]] = [set() for _ in range(n_found)]
    for place in range(len(text)):
        for token in range(n_found):
            start, end = found["offset_mapping"][token]
            if start <= place < end:
                places[token].add(place)
    return ([set() for _ in range(n_tokens - n_found)] + places)[-n_tokens:]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_bytes_of_an_emoji_have_its_character(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = encode_text(tokenizer, "a🇫b")
    found = UserText.find("a🇫b", GenerateRequest(prompt="a🇫b"))
    assert found is not None
    spans = found.spans(tokenizer, "a🇫b", len(ids)).tolist()
    assert spans.count([1, 2]) == 4
    assert [spans[0], spans[-1]] == [[0, 1], [2, 3]]


def test_a_beginning_of_text_token_has_no_span() -> None:
    """It is added in front of the prompt, or one of two is removed."""
    tokenizer = sentencepiece_tokenizer()
    prompt = "<s><s>the end"
    ids = encode_text(tokenizer, prompt)
    assert ids[:2] != [tokenizer.bos_token_id] * 2
    spans = UserText(6, len(prompt)).spans(tokenizer, prompt, len(ids))
    assert spans[0].tolist() == [-1, -1]
    assert spans[1:].min() == 0
    added = UserText(0, 3).spans(tokenizer, "the", len(encode_text(tokenizer, "the")) + 1)
    assert added[0].tolist() == [-1, -1]


def test_a_tokenizer_without_offsets_states_no_span() -> None:
    class Slow:
        is_fast = False

    np.testing.assert_array_equal(UserText(0, 3).spans(Slow(), "the", 3), no_spans(3))


def test_the_last_user_message_is_found(renderer: Renderer) -> None:
    tokenizer = TOKENIZERS["bytes"]
    turns = _turns(CHATML, renderer, tokenizer)
    prompt = "<|im_start|>user\na<|im_end|>\n<|im_start|>user\na" + turns.after_user
    found = UserText.find(prompt, _request("a", Message("user", "a")), turns)
    assert found == UserText(prompt.rindex("a<|im_end|>"), prompt.rindex("a<|im_end|>") + 1)
    assert UserText.find("another form", _request("the question"), turns) is None
    assert UserText.find("", GenerateRequest(prompt="")) is None


@pytest.mark.parametrize(
    ("template", "after_user", "after_answer"),
    [
        (CHATML, "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>assistant\n"),
        (GEMMA, "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n<start_of_turn>model\n"),
        (MISTRAL, " [/INST]", "</s> [/INST]"),
    ],
    ids=["chatml", "gemma", "mistral"],
)
def test_what_templates_write_after_a_text(
    template: str, after_user: str, after_answer: str, renderer: Renderer
) -> None:
    assert _turns(template, renderer, TOKENIZERS["bytes"]) == Turns(after_user, after_answer)


def test_variables_of_the_caller_change_the_turns(renderer: Renderer) -> None:
    tokenizer = TOKENIZERS["bytes"]
    assert _turns(THINKING, renderer, tokenizer, enable_thinking=False).after_user.endswith("</think>\n\n")
    assert not _turns(THINKING, renderer, tokenizer).after_user.endswith("</think>\n\n")


@pytest.mark.parametrize(
    ("template", "error", "reason"),
    [
        ("always the same", TemplateError, "does not write the text of a message as it is"),
        ("{{ messages[0].content }}{% if messages[1] %}{{ raise_exception('no') }}{% endif %}", Rejected, "rejects"),
        ("{{ 1 / 0 }}", TemplateError, "is broken"),
    ],
)
def test_templates_without_turns_are_refused(
    template: str, error: type[Exception], reason: str, renderer: Renderer
) -> None:
    with pytest.raises(error, match=reason):
        _turns(template, renderer, TOKENIZERS["bytes"])
