"""Train a router on measured outcomes, cross-validate it, save it, and load it again.

    python examples/02_train_router.py [FOLDER]                # writes the router to FOLDER (default: my-router)

In practice `coe eval` measures the table; `coe router cv` and `coe router train` do the rest from the command line.
"""

import sys
from pathlib import Path

import numpy as np

from routers import OutcomeTable, Query, build, build_encoder, cross_validate, decide, load, save

COUNTRIES = ["France", "Japan", "Peru", "Chad", "Cuba", "Fiji", "Iran", "Mali", "Oman", "Togo"]
PROMPTS = [f"What is the capital of {country}?" for country in COUNTRIES]
PROMPTS += [f"How much is {a} + {b}?" for a, b in zip(range(10), range(3, 13), strict=True)]


def main(folder: Path) -> None:
    right = np.repeat([[1.0, 0.0], [0.0, 1.0]], 10, axis=0)  # (20 queries, 2 experts): what each expert scored
    table = OutcomeTable(tuple(map(str, range(20))), tuple(PROMPTS), ("capitals", "sums"), right)

    encoder = build_encoder("hashing:256")  # "minilm", the default of the commands, understands far more
    report = cross_validate(lambda: build("knn", encoder, {"k": 3}), table, np.arange(20) % 5)
    print(f"accuracy {report.accuracy:.2f}, best single expert {report.best_single:.2f}")

    save(build("knn", encoder, {"k": 3}).fit(table), folder, table=table, encoder=encoder)
    router = load(folder).router
    for text in ("What is the capital of Peru?", "How much is 70 + 80?"):
        [decision] = decide(router.estimate([Query.of(text)]))
        print(f"{text} -> {decision.experts[0]}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "my-router"))
