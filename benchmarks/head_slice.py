"""Why the hf engine copies the last position before the head: a strided slice against a copy, bf16 on a CPU.

OMP_NUM_THREADS=1 python benchmarks/head_slice.py
"""

from __future__ import annotations

import json
import time

import torch

ROWS, LENGTH = 20, 50
HEADS = {"SmolLM2-135M": (49_152, 576), "Gemma 3 270M": (262_144, 640)}  # (vocabulary, hidden size)


def main() -> None:
    for name, (vocabulary, hidden) in HEADS.items():
        weight = torch.randn(vocabulary, hidden, dtype=torch.bfloat16)
        last = torch.randn(ROWS, LENGTH, hidden, dtype=torch.bfloat16)[:, -1:, :]  # (B, 1, D), strided
        seconds = {}
        for kind, states in (("copy", last.contiguous()), ("slice", last)):
            started = time.process_time()
            with torch.inference_mode():
                torch.nn.functional.linear(states, weight)
            seconds[f"{kind}_cpu_s"] = round(time.process_time() - started, 3)
        print(json.dumps({"head": name, **seconds}))


if __name__ == "__main__":
    main()
