"""Scores of an adapter or its base on rows of a family: batched greedy generation, the graders of `coe eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from coe.engines.hf.load import copy_before_head
from coe.evaluation.graders import GRADERS
from examples.zoo.families import Family, Row
from examples.zoo.training import encode

_BATCH: Final = 20


def answers(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, max_tokens: int, report: Callable[[int], None] = lambda _: None
) -> list[str]:
    """One greedy answer per row; `report` is called with the number done."""
    import torch

    found: list[str] = []
    copy_before_head(model)
    for start in range(0, len(rows), _BATCH):
        prompts = [encode(tokenizer, row.prompt, row.target)[0] for row in rows[start : start + _BATCH]]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)  # (B, T + new)
        width = inputs["input_ids"].shape[1]
        found += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        report(len(found))
    return found


def grades(family: Family, rows: Sequence[Row], said: Sequence[str]) -> list[float]:
    """The score of each answer in [0, 1]."""
    grader = GRADERS[family.grader](**family.grader_options)
    return [
        grader.grade(text, {"prompt": row.prompt, "answer": row.answer, **row.extras})
        for row, text in zip(rows, said, strict=True)
    ]
