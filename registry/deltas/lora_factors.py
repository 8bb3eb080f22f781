"""ComPEFT of LoRA matrices: signs and scales of A and B whose product is close to BA.

A pair (A, B) and (G A, B G^-1) are the same adapter for any invertible G. Trained factors have values of similar size
everywhere, of which few are a poor choice; those of the singular value decomposition of BA concentrate in few rows of A
and columns of B. Both are tried, and the pair that is closer to BA is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from registry.deltas.floats import Values
from registry.deltas.selection import threshold
from registry.deltas.signs import Signs
from registry.headers import Tensor

Ternary = tuple[Signs, float]
"""Signs in the shape of the matrix, and the scale of all of them."""
_PARTS = ((".lora_A.", ".lora_B."), ("lora_embedding_A", "lora_embedding_B"))


def lora_pairs(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Names of the matrices A [rank, in] and B [out, rank] of each adapted layer; other layers are left out."""
    for name, a in tensors.items():
        for part, other in _PARTS:
            partner = name.replace(part, other)
            b = tensors.get(partner) if part in name else None
            if b is not None and len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]:
                yield name, partner


def ternary_pair(a: Values, b: Values, density: float) -> tuple[Ternary, Ternary]:
    """Ternary A and B, the larger share `density` of each; their product is the closest multiple to BA.

    Args:
        a, b: finite, [rank, in] and [out, rank].
    """
    found = [_scaled(a, b, *factors, density) for factors in ((a, b), _singular(a, b))]
    return max(found, key=lambda pair: pair[0])[1]


def ternary(values: Values, density: float) -> Ternary:
    """Signs of the largest share `density` of the values, and the scale that is closest to them: their mean size.

    ComPEFT has alpha times the standard deviation of all values here, and tunes alpha.
    """
    signs = threshold(lambda: [values], round(density * values.size)).signs(values)
    return signs, float(np.abs(values[signs != 0]).mean(dtype=np.float64)) if signs.any() else 0.0


def _scaled(
    a: Values, b: Values, near_a: Values, near_b: Values, density: float
) -> tuple[float, tuple[Ternary, Ternary]]:
    """The cosine of BA and the product of ternary factors, and these with the best scale of their product."""
    (signs_a, scale_a), (signs_b, scale_b) = ternary(near_a, density), ternary(near_b, density)
    coded_a, coded_b = signs_a * np.float32(scale_a), signs_b * np.float32(scale_b)
    # <BA, B'A'> is the trace of a product of [rank, rank] matrices: BA itself may be large.
    inner = float(np.sum((coded_b.T @ b) * (coded_a @ a.T)))
    norm = float(np.sum((coded_b.T @ coded_b) * (coded_a @ coded_a.T)))
    whole = float(np.sum((b.T @ b) * (a @ a.T)))
    if inner <= 0:  # a product of zeros
        return 0.0, ((signs_a, scale_a), (signs_b, scale_b))
    factor = (inner / norm) ** 0.5
    return inner / (norm * whole) ** 0.5, ((signs_a, scale_a * factor), (signs_b, scale_b * factor))


def _singular(a: Values, b: Values) -> tuple[Values, Values]:
    """Factors of BA by its singular value decomposition, which share the singular values; as given if rank is full."""
    rank = a.shape[0]
    if rank > min(a.shape[1], b.shape[0]):
        return a, b
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.T.astype(np.float64))
    left, values, right = np.linalg.svd(r_b @ r_a.T)
    root = np.sqrt(values)
    return (root[:, None] * right @ q_a.T).astype(np.float32), (q_b @ left * root).astype(np.float32)
