"""Compare log-likelihoods over the endpoint with lm-eval's own hf backend, on two multiple-choice tasks.

    COE_DATA_DIR=... COE_CLIENTS_TOKENIZER=<folder of the model> python tests/clients/lm_eval_parity.py \\
        --url http://127.0.0.1:8000/v1 --expert smollm2

Both run the same weights in float32. The accuracies and the chosen option of every question must be equal, and each
option's log-likelihood within TOLERANCE.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any, Final

from client_lm_eval import evaluate

TASKS: Final = ("local_arc_challenge", "local_commonsense")
TOLERANCE: Final = 1e-3
METRICS: Final = ("acc,none", "acc_norm,none")


def loglikelihoods(result: dict[str, Any]) -> list[list[float]]:
    """The log-likelihoods of the options, question by question."""
    samples = sorted(result["samples"], key=lambda sample: sample["doc_id"])
    return [[float(response[0]) for response in sample["filtered_resps"]] for sample in samples]


def chosen(options: list[float]) -> int:
    """The option with the highest log-likelihood, as `acc` counts it."""
    return max(range(len(options)), key=options.__getitem__)


def with_hf(folder: str, task: str, batch_size: int) -> dict[str, Any]:
    """lm-eval's own backend, on the CPU in float32."""
    return evaluate("hf", {"pretrained": folder, "dtype": "float32", "device": "cpu"}, task, batch_size=batch_size)


def over_http(url: str, expert: str, folder: str, task: str, *, tokenized: bool, batch_size: int) -> dict[str, Any]:
    """The endpoint; prompts are sent as token ids, or as text (one a request)."""
    arguments = {
        "model": expert,
        "base_url": f"{url}/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": folder,
        "tokenized_requests": tokenized,
        "batch_size": batch_size if tokenized else 1,
    }
    return evaluate("local-completions", arguments, task)


def compared(task: str, name: str, own: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The accuracies of both, on how many questions they choose alike, and the largest difference of a score."""
    pairs = list(zip(loglikelihoods(own), loglikelihoods(other), strict=True))
    same = sum(chosen(a) == chosen(b) for a, b in pairs)
    worst = max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))
    metrics = {metric: (own[metric], other[metric]) for metric in METRICS}
    equal = worst <= TOLERANCE and same == len(pairs) and all(a == b for a, b in metrics.values())
    counts = {"questions": len(pairs), "options": sum(len(a) for a, _ in pairs), "same_choice": same}
    return {"task": task, "over": name, **counts, **metrics, "largest": worst, "equal": equal}


def main() -> None:
    """Run both tasks on both sides."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--expert", default="smollm2")
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()
    folder, unequal = os.environ["COE_CLIENTS_TOKENIZER"], False
    for task in TASKS:
        started = time.perf_counter()
        own = with_hf(folder, task, options.batch_size)
        own_s = round(time.perf_counter() - started)
        print(f"{task}: hf backend in {own_s} s", file=sys.stderr, flush=True)
        for name, tokenized in (("token ids", True), ("text", False)):
            started = time.perf_counter()
            other = over_http(
                options.url, options.expert, folder, task, tokenized=tokenized, batch_size=options.batch_size
            )
            seconds = (own_s, round(time.perf_counter() - started))
            line = compared(task, name, own, other) | {"seconds": seconds}
            unequal |= not line["equal"]
            print(json.dumps(line), flush=True)
    sys.exit(unequal)


if __name__ == "__main__":
    main()
