"""Training of the classifier of user turns on `phrasings.yaml`: deterministic, in seconds.

python -m routers.conversation.training     # writes dependence.safetensors, prints the errors on held-out phrasings
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Final

import numpy as np
import yaml
from numpy.typing import NDArray

from routers.conversation.dependence import N_FEATURES, WEIGHTS, features, log_odds

PHRASINGS: Final = Path(__file__).with_name("phrasings.yaml")
C: Final = 30.0
"""Inverse strength of the L2 penalty."""
_FILLED: Final = 5
"""Turns of a template with a gap."""

Language = Mapping[str, Sequence[str]]


def phrasings() -> dict[str, Language]:
    """Language -> its phrasings, see the file."""
    loaded: dict[str, Language] = yaml.safe_load(PHRASINGS.read_text(encoding="utf-8"))
    return loaded


def examples(share: float = 1.0, seed: int = 0) -> tuple[list[str], list[int]]:
    """Turns, and whether each cannot stand alone; no held-out phrasing is among them.

    Args:
        share: of the phrasings, drawn at random; for choosing settings by turns that are new to the classifier.
    """
    rng = Random(seed)
    found = []
    for language in phrasings().values():
        follow_ups, complete = (
            [text for template in _drawn(language[kind], share, rng) for text in _filled(template, language, rng)]
            for kind in ("follow_ups", "complete")
        )
        changed = [rng.choice(language["changes"]).replace("{p}", text) for text in complete]
        found += [(text, 1) for text in follow_ups] + [(text, 0) for text in complete + changed]
    return [text for text, _ in found], [label for _, label in found]


def train(share: float = 1.0, seed: int = 0) -> dict[str, NDArray[np.float16]]:
    """The arrays of the classifier. Arguments as for `examples`."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    texts, labels = examples(share, seed)
    buckets = [features(text) for text in texts]
    indptr = np.cumsum([0, *map(len, buckets)])
    values = np.concatenate([np.full(len(found), len(found) ** -0.5) for found in buckets])
    x = csr_matrix((values, np.concatenate(buckets), indptr), shape=(len(texts), N_FEATURES))
    model = LogisticRegression(C=C, max_iter=2_000, class_weight="balanced").fit(x, labels)
    return {"weights": model.coef_[0].astype(np.float16), "bias": model.intercept_.astype(np.float16)}


def errors() -> dict[str, tuple[float, float]]:
    """Language -> share of held-out follow-ups, and of held-out complete turns, that are found to be such."""
    return {
        name: (
            float(np.mean([log_odds(text) > 0 for text in language["held_out_follow_ups"]])),
            float(np.mean([log_odds(text) < 0 for text in language["held_out_complete"]])),
        )
        for name, language in phrasings().items()
    }


def main() -> None:
    """Train, write the weights, and print the errors by language."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in train().items()}, WEIGHTS)
    for name, (follow_ups, complete) in errors().items():
        sys.stdout.write(f"{name:12} follow-ups {follow_ups:.0%}, complete turns {complete:.0%}\n")


def _drawn(templates: Sequence[str], share: float, rng: Random) -> Sequence[str]:
    return templates if share == 1.0 else [template for template in templates if rng.random() < share]


def _filled(template: str, language: Language, rng: Random) -> Iterator[str]:
    """Turns of a template, with things and numbers in its gaps."""
    n = _FILLED if "{" in template else 1
    for _ in range(n):
        text = template
        while "{x}" in text:
            text = text.replace("{x}", rng.choice(language["things"]), 1)
        yield text.replace("{n}", str(rng.randint(2, 400)))


if __name__ == "__main__":
    main()
