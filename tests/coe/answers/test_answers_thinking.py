"""Thinking text is not part of an answer, in the forms of the common chat templates."""

import time

import pytest

from coe.answers.thinking import without_thoughts


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>hm</think> 42", "42"),
        ("hm</think>no</think>\n42 ", "42"),
        ("<think>it never ends", ""),
        ("42 <think>unsure", "42"),
        ("plain", "plain"),
        ("<think>A</think>B<think>c</think>", "B"),
        ("[THINK]x[/THINK]B", "B"),
        (
            "<|channel|>analysis<|message|>Maybe A<|end|><|start|>assistant<|channel|>final<|message|>B<|return|>",
            "B",
        ),
        ("<|channel|>analysis<|message|>Maybe A", ""),
        ("analysisWe think A.assistantfinalB", "B"),
        ("Use the `<think>` tag", "Use the `<think>` tag"),
        ("<reasoning>A 7</reasoning>\n\nB", "B"),
        ("<THINKING>a</THINKING>b", "b"),
        ("<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>B<|END_RESPONSE|>", "B"),
        (
            "<|channel|>commentary to=functions.x <|constrain|>json<|message|>{}<|call|>",
            "",
        ),
        ("<thought>A</thought>B", "B"),
        ("<think>Maybe the answer is A, 7.</think>B", "B"),
    ],
)
def test_thinking_is_left_out(text: str, answer: str) -> None:
    assert without_thoughts(text) == answer
    assert without_thoughts(answer) == answer


@pytest.mark.parametrize("part", ["<think>", "</think>", "<|channel|>a", "<|start|>", "<", "analysis"])
def test_time_is_linear_in_the_text(part: str) -> None:
    started = time.monotonic()
    without_thoughts(part * (1_000_000 // len(part)))
    assert time.monotonic() - started < 10
