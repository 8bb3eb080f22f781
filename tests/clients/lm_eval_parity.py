"""Compare log-likelihoods over the endpoint with lm-eval's own hf backend, on two multiple-choice tasks.

    COE_DATA_DIR=... COE_CLIENTS_TOKENIZER=<folder of the model> python tests/clients/lm_eval_parity.py \\
        --url http://127.0.0.1:8000/v1 --expert smollm2

Both run the same weights in float32. The accuracies must be equal, and each option's log-likelihood within TOLERANCE.
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


def loglikelihoods(result: dict[str, Any]) -> list[float]:
    """The log-likelihood of every option of every row, in order."""
    samples = sorted(result["samples"], key=lambda sample: sample["doc_id"])
    return [float(response[0]) for sample in samples for response in sample["filtered_resps"]]


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
    """The accuracies of both, and the largest difference of a log-likelihood."""
    pairs = list(zip(loglikelihoods(own), loglikelihoods(other), strict=True))
    worst = max(abs(a - b) for a, b in pairs)
    metrics = {metric: (own[metric], other[metric]) for metric in METRICS}
    equal = worst <= TOLERANCE and all(a == b for a, b in metrics.values())
    sums = (sum(a for a, _ in pairs), sum(b for _, b in pairs))
    rows = len(own["samples"])
    return {"task": task, "over": name, "rows": rows, **metrics, "sums": sums, "largest": worst, "equal": equal}


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
        print(f"{task}: hf backend in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        for name, tokenized in (("token ids", True), ("text", False)):
            started = time.perf_counter()
            other = over_http(
                options.url, options.expert, folder, task, tokenized=tokenized, batch_size=options.batch_size
            )
            line = compared(task, name, own, other) | {"seconds": round(time.perf_counter() - started)}
            unequal |= not line["equal"]
            print(json.dumps(line), flush=True)
    sys.exit(unequal)


if __name__ == "__main__":
    main()
