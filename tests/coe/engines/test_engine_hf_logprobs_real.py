"""Log-probabilities of a real small model, SmolLM2-135M-Instruct in float32, beside plain forwards of transformers."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import adapter_spec, say

from coe.chunks import Joined
from coe.engines.base import Adapter
from coe.engines.hf.engine import HFEngine
from coe.sampling import SamplingOptions
from coe.types import Answer, GenerateRequest, TokenLogprob
from registry.spec import ExpertSpec, Kind

pytestmark = pytest.mark.integration

SQL = Path(__file__).parents[3] / "examples" / "zoo" / "adapters" / "sql"
SIGNS = "é 世界 🎉: a line\nof several\tsigns"
QUERY = "SELECT name FROM people WHERE age > 30"
LONG = "Question: Which gas do plants take from the air? " * 6 + "Answer:"


class Plain:
    """The model with and without the adapter, without code of this project."""

    def __init__(self, folder: Path, adapter: Adapter) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model = PeftModel.from_pretrained(model, adapter.path)
        self._seen: dict[tuple[bool, tuple[int, ...]], Any] = {}

    def forward(self, ids: list[int], adapted: bool) -> Any:
        """(n_tokens, n_vocabulary) log-probabilities of what follows each token; the same tokens are read once."""
        key = (adapted, tuple(ids))
        if key not in self._seen:
            with torch.inference_mode(), nullcontext() if adapted else self._model.disable_adapter():
                self._seen[key] = self._model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return self._seen[key]


def check(entries: tuple[TokenLogprob, ...], ids: list[int], scores: Any) -> None:
    for entry, token, row in zip(entries, ids, scores, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [p for _, p, _ in entry.top] == pytest.approx(row.topk(len(entry.top)).values.tolist(), abs=1e-4)


async def test_scores_equal_a_plain_forward_alone_and_in_a_mixed_batch(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    sql = Adapter(adapter_spec(SQL), SQL)
    engine = HFEngine(device="cpu", dtype="float32", prefill_tokens=48)  # the long prompt is read in parts
    expert = await engine.load(ExpertSpec(name="smollm2", kind=Kind.MODEL, source=str(smollm2)), smollm2)

    async def ask(prompt: str, adapter: Adapter | None, **fields: Any) -> Answer:
        joined = Joined()
        options = {"max_tokens": 4, "echo": True, "logprobs": 3, "prompt_logprobs": 3, **fields}
        said = await say(expert, GenerateRequest(prompt=prompt, **options), adapter)
        for chunk in said.chunks:
            joined.add(chunk)
        return joined.answer("smollm2", said.chunks[-1])

    asked = [(SIGNS, None), (QUERY, sql), (LONG, None), (LONG, sql)]
    shaped = {"temperature": 1.0, "seed": 3, "sampling": SamplingOptions(repetition_penalty=1.3, top_k=20)}
    try:
        alone = [await ask(*each) for each in asked]
        mixed = await asyncio.gather(
            *(ask(*each) for each in asked), ask("A story: once", None, echo=False, max_tokens=6, **shaped)
        )
    finally:
        await engine.unload(expert)
    plain = Plain(smollm2, sql)
    for (prompt, adapter), *answers in zip(asked, alone, mixed, strict=False):
        for answer in answers:
            assert answer.text.startswith(prompt)
            data = b"".join(entry.data or b"" for entry in answer.prompt_logprobs)
            assert data.decode() == prompt
            best = [entry.top[0][0] for entry in answer.logprobs]  # greedy
            assert [entry.token for entry in answer.logprobs] == best
            ids = tuple(tokenizer(answer.text[len(prompt) :])["input_ids"])
            all_ids = [*tokenizer(prompt)["input_ids"], *ids]
            scores = plain.forward(all_ids, adapter is not None)
            n = len(answer.prompt_logprobs)
            assert answer.prompt_logprobs[0].logprob is None
            check(answer.prompt_logprobs[1:], all_ids[1:n], scores[: n - 1])
            if answer.finish_reason == "length" and len(ids) == 4:
                check(answer.logprobs, all_ids[n:], scores[n - 1 : -1])
    assert len({answer.text for answer in alone}) == len(alone)  # the adapter changes the answers
    assert len(mixed[-1].logprobs) == 6
