"""Log-probabilities, echo and token prompts of hf experts, compared with plain forwards of transformers."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from engine_models import Said, model_spec, say  # noqa: E402

from coe.chunks import Joined  # noqa: E402
from coe.engines.base import Adapter  # noqa: E402
from coe.engines.hf import logprobs as hf_logprobs  # noqa: E402
from coe.engines.hf.engine import HFEngine  # noqa: E402
from coe.engines.hf.expert import HFExpert  # noqa: E402
from coe.engines.hf.logprobs import PromptScorer  # noqa: E402
from coe.engines.logprobs import TokenTexts  # noqa: E402
from coe.errors import ContextLengthExceeded, Rejected, Scope  # noqa: E402
from coe.protocol.answers import TextAnswer  # noqa: E402
from coe.protocol.requests import parse_completion  # noqa: E402
from coe.sampling import SamplingOptions  # noqa: E402
from coe.types import Answer, GenerateRequest, TokenLogprob, Usage  # noqa: E402
from routers.base import Message  # noqa: E402

PROMPTS = ["the capital of france is", "paris", "the end of the answer, the end" * 3, "e"]


def scores_of(folder: Path, ids: Sequence[int], adapter: Adapter | None = None) -> Any:
    """(n_tokens, n_vocabulary) log-probabilities of what follows each token, without any code of this project."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter.path)
    with torch.inference_mode():
        return model(torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)


def whole(said: Said) -> Answer:
    joined = Joined()
    for chunk in said.chunks:
        joined.add(chunk)
    return joined.answer("tiny", said.chunks[-1])


def check(entries: Sequence[TokenLogprob], ids: Sequence[int], scores: Any, tokenizer: Any, n_top: int) -> None:
    """The entries are of these tokens; `scores[i]` predicts token i."""
    texts = TokenTexts(tokenizer)
    assert [entry.token for entry in entries] == [texts.of(i)[0] for i in ids]
    for entry, token, row in zip(entries, ids, scores, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(n_top)
        assert [text for text, _, _ in entry.top] == [texts.of(i)[0] for i in best.indices.tolist()]
        assert [logprob for _, logprob, _ in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


# Generated tokens


async def test_log_probabilities_are_those_of_the_softmax_before_temperature_and_penalties(
    expert: HFExpert, tiny: Path, tokenizer: Any
) -> None:
    options = SamplingOptions(frequency_penalty=1.5, logit_bias={70: 5.0})
    plain = GenerateRequest(prompt="the capital", max_tokens=12, logprobs=3)
    shaped = replace(plain, temperature=1.3, seed=4, sampling=options)
    answers = [whole(each) for each in await asyncio.gather(say(expert, plain), say(expert, shaped))]
    prompt = tokenizer("the capital")["input_ids"]
    ids_of = {TokenTexts(tokenizer).of(i)[0]: i for i in range(len(tokenizer))}
    for answer in answers:
        ids = [ids_of[entry.token] for entry in answer.logprobs]
        assert len(ids) == 12
        check(answer.logprobs, ids, scores_of(tiny, prompt + ids)[len(prompt) - 1 : -1], tokenizer, 3)
    assert answers[0].text != answers[1].text


async def test_text_and_entries_describe_the_same_tokens_while_streaming(expert: HFExpert) -> None:
    request = GenerateRequest(messages=(Message("user", "the capital of france"),), max_tokens=40, logprobs=0)
    said = await say(expert, request)
    entries = [entry for chunk in said.chunks for entry in chunk.logprobs]
    assert len(entries) == 40
    assert not any(entry.top for entry in entries)
    data = b"".join(entry.data or b"" for entry in entries)
    assert data.decode(errors="replace") == said.text
    assert len([chunk for chunk in said.chunks if chunk.logprobs]) > 1


async def test_without_the_option_there_are_none(expert: HFExpert) -> None:
    answer = whole(await say(expert, GenerateRequest(prompt="the", max_tokens=4)))
    assert answer.logprobs == answer.prompt_logprobs == ()


async def test_tokens_of_a_stop_string_and_the_end_token_have_entries(
    engine: HFEngine, tiny: Path, expert: HFExpert, tokenizer: Any
) -> None:
    request = GenerateRequest(prompt="the capital", max_tokens=30, logprobs=0)
    free = whole(await say(expert, request))
    stop = free.text[6:8]
    cut = whole(await say(expert, replace(request, stop=(stop,))))
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(stop)]
    assert len(cut.logprobs) == cut.usage.completion_tokens
    assert cut.logprobs == free.logprobs[: len(cut.logprobs)]
    assert b"".join(entry.data or b"" for entry in cut.logprobs).decode(errors="replace") == cut.text + stop

    biased = replace(request, sampling=SamplingOptions(logit_bias={tokenizer.eos_token_id: 100.0}))
    ended = whole(await say(expert, biased))
    assert (ended.text, ended.finish_reason, ended.usage.completion_tokens) == ("", "stop", 1)
    assert [entry.token for entry in ended.logprobs] == ["<|im_end|>"]


def test_parts_of_characters_are_named_by_their_bytes(tokenizer: Any) -> None:
    texts = TokenTexts(tokenizer)
    found = [texts.of(i) for i in tokenizer("é <|im_end|>\ufffd", add_special_tokens=False)["input_ids"]]
    assert found[:2] == [("bytes:\\xc3", b"\xc3"), ("bytes:\\xa9", b"\xa9")]
    assert b"".join(data or b"" for _, data in found).decode() == "é <|im_end|>\ufffd"
    assert ("<|im_end|>", b"<|im_end|>") in found


def sentencepiece() -> Any:
    """A tokenizer of the SentencePiece kind: `▁` for a space, bytes for what the vocabulary lacks."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁end", "a", "▁a", "\ufffd"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_tokens_of_sentencepiece_keep_their_space_inside_a_text() -> None:
    tokenizer = sentencepiece()
    texts = TokenTexts(tokenizer)
    ids = {piece: tokenizer.convert_tokens_to_ids(piece) for piece in ("<s>", "▁the", "▁end", "<0xE4>", "\ufffd")}
    assert [texts.of(i) for i in ids.values()] == [
        ("<s>", b"<s>"),
        (" the", b" the"),
        (" end", b" end"),
        ("bytes:\\xe4", b"\xe4"),
        ("\ufffd", "\ufffd".encode()),
    ]
    prompt = [hf_logprobs.Scored(ids[piece], None) for piece in ("<s>", "▁the", "▁end")]
    assert [entry.token for entry in texts.logprobs(prompt)] == ["<s>", "the", " end"]
    assert texts.logprobs(prompt)[1].data == b"the"


# Prompts


async def test_prompts_of_a_mixed_batch_have_the_scores_of_plain_forwards(
    expert: HFExpert, tiny: Path, tokenizer: Any, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = [None, adapters[0], adapters[1], None]
    asked = [
        (GenerateRequest(prompt=prompt, max_tokens=3, echo=True, logprobs=2, prompt_logprobs=2), adapter)
        for prompt, adapter in zip(PROMPTS, experts, strict=True)
    ]
    asked.append((GenerateRequest(prompt="the answer", max_tokens=9), adapters[2]))
    alone = [whole(await say(expert, *each)) for each in asked]
    row = hf_logprobs.scoring_bytes(expert.loaded.model, 5)
    monkeypatch.setattr(hf_logprobs, "SCORING_BYTES", row * 3)  # several chunks
    mixed = [whole(each) for each in await asyncio.gather(*(say(expert, *each) for each in asked))]
    for (request, adapter), one, other in zip(asked[:4], alone, mixed, strict=False):
        ids = tokenizer(request.prompt)["input_ids"]
        scores = scores_of(tiny, ids, adapter)
        for answer in (one, other):
            first, *others = answer.prompt_logprobs
            assert first == TokenLogprob(TokenTexts(tokenizer).of(ids[0])[0], None, first.data)
            check(others, ids[1:], scores[:-1], tokenizer, 2)
            assert "".join(entry.token for entry in answer.prompt_logprobs) == request.prompt
            assert answer.text.startswith(request.prompt or "")
            assert len(answer.logprobs) == answer.usage.completion_tokens == 3
        assert one.text == other.text
    assert alone[4] == mixed[4]
    assert not mixed[4].prompt_logprobs


async def test_the_scores_of_the_prompt_are_in_the_first_chunk_with_its_text(expert: HFExpert) -> None:
    request = GenerateRequest(prompt="the capital", max_tokens=30, echo=True, prompt_logprobs=0)
    first, *others = (await say(expert, request)).chunks
    assert (first.text, first.logprobs) == ("the capital", ())
    assert first.prompt_logprobs
    assert not any(chunk.prompt_logprobs for chunk in others)


async def test_a_model_without_a_cache_passes_the_prompt_on_once(expert: HFExpert) -> None:
    request = GenerateRequest(prompt="the capital", max_tokens=6, echo=True, prompt_logprobs=0, logprobs=0)
    expected = whole(await say(expert, request))
    expert.loaded.model.generation_config.use_cache = False
    answer = whole(await say(expert, request))
    assert answer.text == expected.text
    assert [e.token for e in answer.prompt_logprobs] == [e.token for e in expected.prompt_logprobs]
    assert [e.token for e in answer.logprobs] == [e.token for e in expected.logprobs]


def test_a_module_whose_forward_a_library_replaced_keeps_that_one() -> None:
    module = torch.nn.Linear(2, 2)
    replaced = module.forward = lambda inputs: inputs + 1
    with hf_logprobs._returns(module, "kept"):
        assert module(torch.zeros(1)) == "kept"
    assert module.forward is replaced


async def test_no_token_is_generated_for_a_limit_of_zero(expert: HFExpert, tokenizer: Any) -> None:
    request = GenerateRequest(prompt="the capital", max_tokens=0, echo=True, logprobs=1, prompt_logprobs=1)
    some, none = await asyncio.gather(say(expert, replace(request, max_tokens=5)), say(expert, request))
    answer = whole(none)
    n_prompt = len(tokenizer("the capital")["input_ids"])
    assert (answer.text, answer.finish_reason, answer.usage) == ("the capital", "length", Usage(n_prompt, 0))
    assert answer.logprobs == ()
    assert len(answer.prompt_logprobs) == n_prompt
    assert whole(some).usage == Usage(n_prompt, 5)


async def test_echo_alone_puts_the_prompt_before_the_answer(expert: HFExpert) -> None:
    request = GenerateRequest(prompt="the capital", max_tokens=6, stop=("the",))
    plain, echoed = await say(expert, request), await say(expert, replace(request, echo=True))
    assert echoed.text == "the capital" + plain.text  # a stop string does not stop in the prompt
    assert whole(echoed).prompt_logprobs == ()
    turns = GenerateRequest(messages=(Message("user", "the end"),), max_tokens=2, echo=True)
    assert (await say(expert, turns)).text.startswith("<|im_start|>user\nthe end<|im_end|>\n<|im_start|>assistant\n")


async def test_the_result_of_a_call_that_wants_scores(expert: HFExpert, tiny: Path, tokenizer: Any) -> None:
    assert HFEngine.capabilities.serves("scores")
    ids = tokenizer("the capital of france")["input_ids"]
    answer = whole(await say(expert, GenerateRequest(prompt="the capital of france", max_tokens=1, wants="scores")))
    assert answer.value is not None and not answer.prompt_logprobs
    first, *values = struct.unpack(f"<{len(ids)}f", answer.value)
    assert first != first  # NaN: nothing precedes the first token
    scores = scores_of(tiny, ids)
    assert values == pytest.approx([float(scores[i, token]) for i, token in enumerate(ids[1:])], abs=1e-4)


async def test_a_batch_of_scored_prompts_that_runs_out_of_memory_is_split(
    expert: HFExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GenerateRequest(prompt="the capital", max_tokens=1, echo=True, prompt_logprobs=1)
    expected = whole(await say(expert, request))
    run, sizes = PromptScorer._logits, []

    def small_memory(self: PromptScorer, inputs: Any, start: int, end: int) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return run(self, inputs, start, end)

    monkeypatch.setattr(PromptScorer, "_logits", small_memory)
    said = await asyncio.gather(*(say(expert, request) for _ in range(5)))
    for answer in map(whole, said):
        assert (answer.text, answer.usage) == (expected.text, expected.usage)
        assert [e.token for e in answer.prompt_logprobs] == [e.token for e in expected.prompt_logprobs]
        assert answer.prompt_logprobs[1].logprob == pytest.approx(expected.prompt_logprobs[1].logprob, abs=1e-4)
    assert max(sizes) > 2


async def test_the_body_of_scored_prompts_is_what_lm_eval_reads(expert: HFExpert, tiny: Path, tokenizer: Any) -> None:
    """lm-eval sends context and continuation as token ids, with one new token, which it leaves out of the sums."""
    contexts = [tokenizer(text)["input_ids"] for text in ("the capital of france", "e", "the end of the é")]
    likely = [int(scores_of(tiny, ids)[-1].argmax()) for ids in contexts]
    asked = [(ids, [best]) for ids, best in zip(contexts, likely, strict=True)]  # greedy continuations
    asked += [(ids, tokenizer(" of é")["input_ids"]) for ids in contexts]
    prompts = [context + continuation for context, continuation in asked]
    body = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    said = await asyncio.gather(*(say(expert, request) for request in parse_completion(body).requests))
    for (context, continuation), one in zip(asked, said, strict=True):
        found = TextAnswer("id", 0, "tiny").choice(whole(one))["logprobs"]
        own = slice(len(context), -1)
        total = sum(found["token_logprobs"][own])
        top = found["top_logprobs"][own]
        greedy = all(p == max(t.values()) for p, t in zip(found["token_logprobs"][own], top, strict=True))
        scores = scores_of(tiny, context + continuation)[len(context) - 1 : -1]
        assert total == pytest.approx(sum(float(s[t]) for s, t in zip(scores, continuation, strict=True)), abs=1e-4)
        assert greedy == (scores.argmax(-1).tolist() == continuation)
        assert {len(values) for values in found.values()} == {len(context) + len(continuation) + 1}
        assert found["text_offset"] == sorted(found["text_offset"]) and found["text_offset"][0] == 0


# Models that change the scores of their head


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "gpt2", "granite"])
def test_scores_are_those_that_the_model_makes_of_its_head(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90}
    small |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings: dict[str, dict[str, Any]] = {
        "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "final_logit_softcapping": 2.0},
        "cohere": {"num_key_value_heads": 2, "intermediate_size": 64, "logit_scale": 9.0},
        "gpt2": {},
        "granite": {"num_key_value_heads": 2, "intermediate_size": 64, "logits_scaling": 0.2},
    }
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, **settings[kind])).eval()
    ids = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(1))
    lengths = [11, 4, 7]
    mask = torch.tensor([[0] * (11 - n) + [1] * n for n in lengths])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": 1}
    monkeypatch.setattr(hf_logprobs, "SCORING_BYTES", 4 * hf_logprobs.scoring_bytes(model, 3))
    scorer = PromptScorer(model, lengths, [2, None, 1])
    with torch.inference_mode():
        output = scorer(**inputs, return_dict=True)
        plain = model(**{**inputs, "logits_to_keep": 0}, return_dict=True)
        assert torch.allclose(output.logits, plain.logits[:, -1:], atol=1e-5)
        again = model(**inputs, return_dict=True)  # the model computes as before
        assert torch.allclose(again.logits, output.logits, atol=1e-5)
    assert scorer.prompts[1] == []
    for i, n_top in ((0, 2), (2, 1)):
        scores = plain.logits[i].float().log_softmax(-1)
        first, *others = scorer.prompts[i]
        start = 11 - lengths[i]
        assert (first.token, first.logprob) == (int(ids[i, start]), None)
        assert [s.token for s in others] == ids[i, start + 1 :].tolist()
        expected = [float(scores[start + j, s.token]) for j, s in enumerate(others)]
        assert [s.logprob for s in others] == pytest.approx(expected, abs=1e-4)
        assert all(len(s.top) == n_top for s in others)


# Token prompts


async def test_token_ids_are_taken_as_they_are(expert: HFExpert, tokenizer: Any) -> None:
    ids = tuple(tokenizer("the capital of france")["input_ids"])
    text = await say(expert, GenerateRequest(prompt="the capital of france", max_tokens=8, echo=True))
    tokens = await say(expert, GenerateRequest(prompt="", prompt_ids=ids, max_tokens=8, echo=True))
    assert (tokens.text, tokens.usage) == (text.text, text.usage)
    bos = tokenizer.bos_token_id
    doubled = await say(expert, GenerateRequest(prompt="", prompt_ids=(bos, bos, *ids), max_tokens=1, echo=True))
    assert doubled.usage == Usage(len(ids) + 2, 1)
    assert doubled.text.startswith("<|im_start|>" * 2 + "the capital of france")


async def test_a_prompt_of_tokens_may_end_inside_a_character(expert: HFExpert, tokenizer: Any) -> None:
    ids = tokenizer("the é")["input_ids"]
    bias = SamplingOptions(logit_bias={ids[-1]: 100.0})
    said = await say(expert, GenerateRequest(prompt="", prompt_ids=tuple(ids[:-1]), max_tokens=1, sampling=bias))
    assert said.text == "é"


@pytest.mark.parametrize("wrong", [-1, 10**9])
async def test_ids_outside_the_vocabulary_are_rejected_by_this_expert(expert: HFExpert, wrong: int) -> None:
    n = expert._preparation._n_ids
    for request in (
        GenerateRequest(prompt="", prompt_ids=(1, wrong), max_tokens=1),
        GenerateRequest(prompt="the", max_tokens=1, sampling=SamplingOptions(logit_bias={wrong: 1.0})),
    ):
        with pytest.raises(Rejected, match=f"token id {wrong}, but the vocabulary of 'tiny' has {n} tokens") as caught:
            await say(expert, request)
        assert (caught.value.scope, caught.value.status) == (Scope.EXPERT, 400)
    last = await say(expert, GenerateRequest(prompt="", prompt_ids=(n - 1,), max_tokens=1))
    assert last.usage == Usage(1, 1)


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
async def test_most_likely_tokens_are_bounded(expert: HFExpert, field: str) -> None:
    most = whole(await say(expert, GenerateRequest(prompt="the capital", max_tokens=1, **{field: 20})))
    assert len((*most.logprobs, *most.prompt_logprobs)[-1].top) == 20
    with pytest.raises(Rejected, match="'tiny' returns at most 20 most likely tokens for each token, not 21"):
        await say(expert, GenerateRequest(prompt="the", max_tokens=1, **{field: 21}))


async def test_token_prompts_obey_the_context(expert: HFExpert) -> None:
    with pytest.raises(ContextLengthExceeded):
        await say(expert, GenerateRequest(prompt="", prompt_ids=(5,) * expert.context_length, max_tokens=1))
    full = GenerateRequest(prompt="", prompt_ids=(5,) * expert.context_length, max_tokens=0, echo=True)
    assert (await say(expert, full)).usage == Usage(expert.context_length, 0)


async def test_scoring_counts_in_the_memory_of_a_batch(engine: HFEngine, tiny: Path) -> None:
    from test_engine_hf_batch import limits, row

    from coe.engines.hf.waiting import choose_batch

    scored = row(3, echo=True, prompt_logprobs=0)
    plain = [row(3), row(3)]
    assert len(choose_batch([*plain, scored], limits(tokens=100, scoring=80))) == 2
    assert len(choose_batch([*plain, scored], limits(tokens=100, scoring=50))) == 3
    many = [row(10, echo=True, prompt_logprobs=4) for _ in range(3)]  # 50 entries each
    assert len(choose_batch(many, limits(entries=100))) == 2
    assert len(choose_batch(many, limits(entries=99))) == 1
    expert = await engine.load(model_spec(tiny), tiny)
    try:
        assert expert._worker.limits().scoring * expert.loaded.cache_bytes_per_token >= hf_logprobs.SCORING_BYTES
    finally:
        await engine.unload(expert)
