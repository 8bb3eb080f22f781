"""What the fields of requests mean, for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

DESCRIPTIONS: Final[Mapping[str, str]] = {
    "model": "`auto`, `coe/<policy>`, or the name of an expert.",
    "messages": "The conversation, oldest message first.",
    "prompt": "A text or token ids that are continued, or an array of either: each is answered on its own.",
    "input": "A text or token ids, or an array of either; each has a vector.",
    "encoding_format": "`float`, the default, or `base64`: little-endian float32 numbers.",
    "dimensions": "The first numbers of each vector, scaled to length 1; for models that are trained for it.",
    "max_tokens": "Most new tokens; by default what fits the context, up to 512.",
    "max_output_tokens": "Most new tokens, those of reasoning included; by default what fits the context, up to 512.",
    "max_completion_tokens": "Newer name of `max_tokens`.",
    "temperature": "0, the default, is greedy; OpenAI's default is 1.",
    "top_p": "Sample from the most likely tokens that have this share of the probability.",
    "top_k": "Sample from the k most likely tokens; 0 and -1 are all of them.",
    "min_p": "Sample from tokens with at least this share of the probability of the most likely one.",
    "n": "Answers to each prompt.",
    "best_of": "Only the value of `n`.",
    "stop": "Text that ends the answer and is not part of it.",
    "seed": "The same request with the same seed to the same expert has the same answer.",
    "frequency_penalty": "Subtracted from the logit of a generated token, as often as it was generated.",
    "presence_penalty": "Subtracted once from the logit of a generated token.",
    "repetition_penalty": "Divides positive logits of tokens of prompt and answer, and multiplies negative ones.",
    "logit_bias": "Token id -> value added to its logit.",
    "min_tokens": "The answer does not end before so many tokens.",
    "ignore_eos": "The answer ends at `max_tokens` only.",
    "stream": "Server-sent events in place of one body.",
    "stream_options": "Options of a stream.",
    "logprobs": "Log-probabilities of the generated tokens: in chat true or false, for completions how many likely "
    "tokens are listed at each place.",
    "top_logprobs": "How many likely tokens are listed at each place; a chat also needs `logprobs`.",
    "echo": "The answer starts with the prompt; with `logprobs`, so do the log-probabilities.",
    "response_format": "A JSON object, or one that satisfies a JSON schema.",
    "tools": "Functions that the model may call. Experts that cannot call tools are not chosen.",
    "tool_choice": "Whether the model may, must or must not call a function, or which one.",
    "parallel_tool_calls": "False: at most one call.",
    "instructions": "A system message before the input.",
    "text": "The format of the text: any, a JSON object, or one that satisfies a JSON schema.",
    "reasoning": "`effort` is how much the model reasons, where it can; the other fields have no effect.",
    "include": "`message.output_text.logprobs` adds log-probabilities; the other values have no effect.",
    "metadata": "Entries that the response repeats.",
    "reasoning_effort": "How much the model reasons, where it can.",
    "chat_template_kwargs": "Variables for the expert's chat template.",
    "coe": "The extension of this service: which experts may answer, cost weight, deadline, priority.",
}
"""Field -> its meaning."""
