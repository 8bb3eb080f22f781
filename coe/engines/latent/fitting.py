"""Whether saved tensors are those that the settings of an artifact state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from coe.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
_MOST_PROBLEMS: Final = 5


def sizes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_fit(tensors: Mapping[str, Tensor], wanted: Shapes, *, what: str, among: bool = False) -> None:
    """Compare the tensors of an artifact with what its settings state.

    Args:
        what: the file or its tensors, for the message.
        among: `wanted` is a part of them, such as the large ones before memory is taken for their copies; values are
            not read.

    Raises:
        WeightsError: a tensor is missing, or of another shape; unless `among`, also one that is unknown, or not finite.
    """
    found = sizes_of(tensors)
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [
        f"{name} has the shape {found[name]} instead of {tuple(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != tuple(shape)
    ]
    if not among:
        problems += [f"{name} is unknown" for name in found if name not in wanted]
    if not among and not problems:
        problems = [f"{name} is not finite" for name, each in tensors.items() if not bool(each.isfinite().all())]
    if problems:
        raise WeightsError(f"{what} does not fit its settings: {'; '.join(problems[:_MOST_PROBLEMS])}")
