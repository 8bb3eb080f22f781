"""Running: a started vLLM engine, and what the answers of its model need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coe.engines.answer import AnswerStreams
from coe.engines.base import Adapter
from coe.engines.constrained.checker import GrammarChecker
from coe.engines.constrained.compiler import Grammars
from coe.engines.logprobs import TokenTexts
from coe.engines.vllm.adapters import Adapters
from coe.engines.vllm.parsers import AnswerParsers


@dataclass(frozen=True, slots=True)
class Running:
    """A started engine.

    Attributes:
        llm: vLLM's AsyncLLM.
        adapters: those that are in it.
        tokenizer: of transformers, from the files of the expert.
        texts, answers, grammars, parsers: made of it.
        ends: tokens that end an answer.
        n_ids: token ids of the model.
        context_length: tokens of prompt and answer together.
    """

    llm: Any
    adapters: Adapters
    tokenizer: Any
    texts: TokenTexts
    answers: AnswerStreams
    grammars: Grammars
    parsers: AnswerParsers
    ends: frozenset[int]
    n_ids: int
    context_length: int


def describe(
    llm: Any, path: Path, checker: GrammarChecker, check: Callable[[Adapter], None], max_adapters: int
) -> Running:
    """What an AsyncLLM serves that has the weights in `path`. Blocks.

    Args:
        checker: checks grammars. check: checks adapters.
        max_adapters: adapters that it keeps.
    """
    from transformers import AutoTokenizer
    from vllm.lora.request import LoRARequest

    config = llm.model_config
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    n_ids = config.get_vocab_size()
    return Running(
        llm=llm,
        adapters=Adapters(llm, max_adapters, check, LoRARequest),
        tokenizer=tokenizer,
        texts=TokenTexts(tokenizer),
        answers=AnswerStreams(tokenizer),
        grammars=Grammars(tokenizer, n_ids, checker),
        parsers=AnswerParsers(tokenizer, config),
        ends=_ends(config, tokenizer),
        n_ids=n_ids,
        context_length=config.max_model_len,
    )


def _ends(config: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, from the generation config, the config and the tokenizer."""
    generation = config.try_get_generation_config()
    stated = (generation.get("eos_token_id"), config.hf_text_config.eos_token_id, tokenizer.eos_token_id)
    return frozenset(
        each for ids in stated if ids is not None for each in (ids if isinstance(ids, list | tuple) else [ids])
    )
