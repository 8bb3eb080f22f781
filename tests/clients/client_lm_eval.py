"""lm-evaluation-harness: generation and log-likelihood tasks over the endpoint.

COE_CLIENTS_TOKENIZER is the folder of the expert's tokenizer, with which the harness counts tokens.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import lm_eval
from feature import Endpoint, feature, main
from lm_eval.tasks import TaskManager

TASKS: Final = Path(__file__).parent / "lm_eval_tasks"


def evaluate(model: str, arguments: dict[str, Any], task: str, **options: Any) -> dict[str, Any]:
    """The result of one task, with its samples under `samples`."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[task], task_manager=manager, bootstrap_iters=0, **options
    )
    return {**found["results"][task], "samples": found["samples"][task]}


def _completions(at: Endpoint, **arguments: Any) -> dict[str, Any]:
    settings = {"tokenizer_backend": "huggingface", "tokenizer": os.environ["COE_CLIENTS_TOKENIZER"], "max_retries": 1}
    return {"model": at.expert, "base_url": f"{at.url}/completions", **settings, **arguments}


@feature("chat")
def chat(at: Endpoint) -> None:
    arguments = {"model": at.expert, "base_url": f"{at.url}/chat/completions", "max_retries": 1}
    result = evaluate("local-chat-completions", arguments, "local_capitals_answered", apply_chat_template=True)
    assert result["exact_match,named"] >= 0.5


@feature("completions")
def completions(at: Endpoint) -> None:
    arguments = _completions(at, tokenized_requests=False)
    assert evaluate("local-completions", arguments, "local_capitals_completed")["exact_match,named"] >= 0.5


@feature("several prompts")
def several_prompts(at: Endpoint) -> None:
    """All four prompts in one request."""
    arguments = _completions(at, tokenized_requests=False, batch_size=4)
    assert evaluate("local-completions", arguments, "local_capitals_completed")["exact_match,named"] >= 0.5


@feature("log-likelihood", scripted=False)
def loglikelihood(at: Endpoint) -> None:
    """Prompts as token ids, four a request."""
    assert evaluate("local-completions", _completions(at, batch_size=4), "local_capitals")["acc,none"] >= 0.5


@feature("log-likelihood of text", scripted=False)
def loglikelihood_text(at: Endpoint) -> None:
    arguments = _completions(at, tokenized_requests=False)
    assert evaluate("local-completions", arguments, "local_capitals")["acc,none"] >= 0.5


if __name__ == "__main__":
    main("lm-eval")
