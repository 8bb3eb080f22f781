"""Training of the refusal classifier on the phrasings of `refusal_phrasings.yaml`: deterministic, in seconds.

python -m coe.answers.refusal_training     # writes refusals.safetensors, prints the errors on held-out phrasings
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import yaml
from numpy.typing import NDArray

from coe.answers.refusals import CLASSES, N_FEATURES, WEIGHTS, clauses, features, refuses

PHRASINGS: Final = Path(__file__).with_name("refusal_phrasings.yaml")
C: Final = 30.0
"""Inverse strength of the L2 penalty."""
PLAIN: Final = (
    "A",
    "B",
    "42",
    "3.5 kg",
    "$12",
    "12:30",
    "x = 4",
    "yes",
    "no",
    "[account]",
    "ls -l",
    "2024-01-31",
    "true",
)
"""Answers in no language."""

Language = Mapping[str, Sequence[str]]


def phrasings() -> dict[str, Language]:
    """Language -> its templates, see the file."""
    loaded: dict[str, Language] = yaml.safe_load(PHRASINGS.read_text(encoding="utf-8"))
    return loaded


def filled(language: Language, kind: str) -> Iterator[str]:
    """The templates of a kind, with all topics and things in their places."""
    for template in language[kind]:
        topics = language["topics"] if "{t}" in template else [""]
        things = language["things"] if "{x}" in template else [""]
        for topic, thing in itertools.product(topics, things):
            yield template.replace("{t}", topic).replace("{x}", thing)


def examples() -> tuple[list[str], list[int]]:
    """Clauses and the index of their class; no held-out phrasing is among them."""
    texts, kinds = list(PLAIN), [0] * len(PLAIN)
    for language in phrasings().values():
        for kind, name in enumerate(("answers", "refusals", "around")):
            found = [clause for text in filled(language, name) for clause in ([text] if kind == 0 else clauses(text))]
            texts += found
            kinds += [kind] * len(found)
    return texts, kinds


def train() -> dict[str, NDArray[np.float16]]:
    """The arrays of the classifier."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    texts, kinds = examples()
    buckets = [features(text) for text in texts]
    indptr = np.cumsum([0, *map(len, buckets)])
    values = np.concatenate([np.full(len(found), 1 / max(1.0, len(found) ** 0.5)) for found in buckets])
    x = csr_matrix((values, np.concatenate(buckets), indptr), shape=(len(texts), N_FEATURES))
    model = LogisticRegression(C=C, max_iter=2_000, class_weight="balanced").fit(x, kinds)
    return {"weights": model.coef_.T.astype(np.float16), "bias": model.intercept_.astype(np.float16)}


def errors() -> dict[str, tuple[float, float]]:
    """Language -> recall on held-out refusals, and the share of held-out right answers that count as refusals."""
    found = {}
    for name, language in phrasings().items():
        refusals = [refuses(text) for text in filled(language, "held_out")]
        right = [refuses(text) for text in filled(language, "right")]
        found[name] = (float(np.mean(refusals)), float(np.mean(right)))
    return found


def main() -> None:
    """Train, write the weights, and print the errors by language."""
    from safetensors.numpy import save_file

    arrays = train()
    assert arrays["weights"].shape == (N_FEATURES, len(CLASSES))
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, WEIGHTS)
    for name, (recall, alarms) in errors().items():
        print(f"{name:10} recall {recall:.1%}, false alarms {alarms:.1%}")


if __name__ == "__main__":
    main()
