"""AnswerChunks: vLLM's outputs of one request as chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coe.engines.hf.logprobs import TokenTexts, packed
from coe.engines.vllm.logprobs import scored, scored_prompt
from coe.errors import EngineError
from coe.types import Chunk, FinishReason, GenerateRequest, TokenLogprob, Usage

_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "cancelled", "repetition": "stop"}


class AnswerChunks:
    """Turns the outputs of one request, which have the new text and tokens only, into chunks.

    Args:
        request: as asked.
        prompt: its text; empty for token prompts.
        prompt_ids: its tokens.
        max_tokens: most new tokens; 0 drops what vLLM generates, which is always one token.
        texts: of single tokens.
    """

    def __init__(
        self, request: GenerateRequest, prompt: str, prompt_ids: Sequence[int], max_tokens: int, texts: TokenTexts
    ) -> None:
        self._request, self._prompt, self._prompt_ids = request, prompt, prompt_ids
        self._max_tokens, self._texts = max_tokens, texts
        self._n_tokens = 0
        self._begun = False
        self._value: bytes | None = None

    def chunk(self, output: Any) -> Chunk | None:
        """The next chunk; None if there is nothing to show yet.

        Args:
            output: vLLM's RequestOutput.

        Raises:
            EngineError: vLLM reports that the generation failed.
        """
        [completion] = output.outputs
        text, prompt_logprobs = self._beginning(output)
        n_new = len(completion.token_ids) if self._max_tokens else 0
        self._n_tokens += n_new
        reason = self._reason(completion.finish_reason)
        chunk = Chunk(
            text + (completion.text if self._max_tokens else ""),
            finish_reason=reason,
            usage=None if reason is None else Usage(len(self._prompt_ids), self._n_tokens),
            value=None if reason is None else self._value,
            logprobs=self._logprobs(completion) if n_new else (),
            prompt_logprobs=prompt_logprobs,
        )
        return None if chunk.is_empty and reason is None else chunk

    def _beginning(self, output: Any) -> tuple[str, tuple[TokenLogprob, ...]]:
        """What precedes the first token: the prompt's text and log-probabilities, as far as wanted."""
        if self._begun:
            return "", ()
        self._begun = True
        echo = "" if not self._request.echo else self._prompt or self._texts.text(self._prompt_ids)
        if output.prompt_logprobs is None:
            return echo, ()
        found = scored_prompt(self._prompt_ids, output.prompt_logprobs, self._request.prompt_logprobs or 0)
        if self._request.wants == "scores":
            self._value = packed(found)
        return echo, self._texts.logprobs(found) if self._request.prompt_logprobs is not None else ()

    def _logprobs(self, completion: Any) -> tuple[TokenLogprob, ...]:
        if self._request.logprobs is None or completion.logprobs is None:
            return ()
        found = scored(completion.token_ids, completion.logprobs, self._request.logprobs)
        return tuple(map(self._texts.logprob, found))

    def _reason(self, reason: str | None) -> FinishReason | None:
        if reason is None:
            return None
        if reason not in _REASONS:
            raise EngineError(f"vLLM ended the answer with {reason!r}")
        return "length" if not self._max_tokens else _REASONS[reason]
