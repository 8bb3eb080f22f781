"""AnswerChunks: vLLM's outputs of one request as chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from coe.chunks import merged
from coe.engines.answer import AnswerStream
from coe.engines.logprobs import TokenTexts, packed
from coe.engines.vllm.logprobs import scored, scored_prompt
from coe.engines.vllm.prepare import Prepared
from coe.errors import EngineError
from coe.types import Chunk, FinishReason, TokenLogprob, Usage

_REASONS: Final[dict[str, FinishReason]] = {
    "stop": "stop",
    "length": "length",
    "abort": "cancelled",
    "repetition": "stop",
}


class AnswerChunks:
    """Turns the outputs of one request, which have the new tokens only, into chunks.

    Args:
        prepared: the request. With `max_tokens` 0, what vLLM generates, which is always one token, is dropped.
        texts: of single tokens.
    """

    def __init__(self, prepared: Prepared, texts: TokenTexts) -> None:
        self._prepared, self._request, self._texts = prepared, prepared.request, texts
        self._n_tokens = 0
        self._begun = False
        self._value: bytes | None = None

    def chunk(self, output: Any) -> Chunk | None:
        """The next chunk; None if there is nothing to show yet.

        Args:
            output: vLLM's RequestOutput.

        Raises:
            EngineError: vLLM reports that the generation failed, or a demanded tool call is missing.
            TemplateError: the response template of the model takes too much time.
        """
        [completion] = output.outputs
        if completion.finish_reason is not None and completion.finish_reason not in _REASONS:
            raise EngineError(f"vLLM ended the answer with {completion.finish_reason!r}")
        beginning = self._beginning(output)
        if not self._prepared.max_tokens:
            return merged(beginning, self._end(Chunk(""), "length"))
        tokens = list(completion.token_ids)
        reason = None if completion.finish_reason is None else _REASONS[completion.finish_reason]
        stream = self._prepared.stream
        if stream is None:
            self._n_tokens += len(tokens)
            piece = Chunk(completion.text, logprobs=self._logprobs(completion, tokens))
            chunk = piece if reason is None else self._end(piece, reason)
        else:
            chunk = self._streamed(stream, completion, tokens, reason)
        chunk = merged(beginning, chunk)
        return None if chunk.is_empty and chunk.finish_reason is None else chunk

    def _streamed(
        self, stream: AnswerStream, completion: Any, tokens: Sequence[int], reason: FinishReason | None
    ) -> Chunk:
        """The chunk of new tokens; the stream may find that the answer is complete."""
        piece, n_taken = Chunk(""), 0
        for token in tokens:
            n_taken += 1
            self._n_tokens += 1
            if token in self._prepared.ends:
                stream.push_end(token)
                continue
            stream.push(token)
            may_stop = self._n_tokens >= self._request.sampling.min_tokens
            piece = merged(piece, stream.take(search=may_stop))
            if stream.stopped:
                reason = "stop"
                break
        if reason is not None:
            piece = merged(piece, stream.take(last=True))
            if reason == "length" and stream.stopped:
                reason = "stop"
            if reason == "stop" and stream.lacks_call:
                raise EngineError("the model did not call a tool, although the request demands it")
            if reason == "stop" and stream.n_calls:
                reason = "tool_calls"
        logprobs = self._logprobs(completion, tokens[:n_taken])
        piece = merged(piece, Chunk("", logprobs=logprobs))
        return piece if reason is None else self._end(piece, reason)

    def _end(self, piece: Chunk, reason: FinishReason) -> Chunk:
        usage = Usage(len(self._prepared.prompt_ids), self._n_tokens)
        return merged(piece, Chunk("", finish_reason=reason, usage=usage, value=self._value))

    def _beginning(self, output: Any) -> Chunk:
        """What precedes the first token: the prompt's text and log-probabilities, as far as wanted."""
        if self._begun:
            return Chunk("")
        self._begun = True
        request, prompt_ids = self._request, self._prepared.prompt_ids
        echo = "" if not request.echo else self._prepared.prompt or self._texts.text(prompt_ids)
        if output.prompt_logprobs is None:
            return Chunk(echo)
        found = scored_prompt(prompt_ids, output.prompt_logprobs, request.prompt_logprobs or 0)
        if request.wants == "scores":
            self._value = packed(found)
        logprobs = self._texts.logprobs(found) if request.prompt_logprobs is not None else ()
        return Chunk(echo, prompt_logprobs=logprobs)

    def _logprobs(self, completion: Any, tokens: Sequence[int]) -> tuple[TokenLogprob, ...]:
        if self._request.logprobs is None or not completion.logprobs:
            return ()
        found = scored(tokens, completion.logprobs[: len(tokens)], self._request.logprobs)
        return tuple(self._texts.logprob(each) for each in found)
