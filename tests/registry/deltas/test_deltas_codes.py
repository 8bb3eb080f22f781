"""Codes of chunks: positions, signs, planes of bytes, and numbers in short types."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.deltas import golomb
from registry.deltas.floats import to_bytes, to_values
from registry.deltas.planes import decode_planes, encode_planes
from registry.deltas.signs import decode_signs, encode_signs
from registry.errors import SourceError

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SIGNS = st.lists(st.sampled_from([-1, 0, 0, 0, 1]), max_size=300)
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@UNTIMED
@given(SIGNS)
def test_signs_come_back(values: list[int]) -> None:
    signs = np.array(values, np.int8)
    positions, found = decode_signs(memoryview(encode_signs(signs)), signs.size)
    again = np.zeros_like(signs)
    again[positions] = found
    assert again.tolist() == values


@UNTIMED
@given(st.integers(1, 2**31), st.data())
def test_positions_come_back_however_far_apart(length: int, data: st.DataObject) -> None:
    wanted = sorted(data.draw(st.sets(st.integers(0, length - 1), max_size=20)))
    code = golomb.encode(np.array(wanted, np.int64), length)
    positions, used = golomb.decode(memoryview(code), length)
    assert positions.tolist() == wanted and used == len(code)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.5])
def test_signs_take_about_their_entropy(density: float) -> None:
    rng = np.random.default_rng(0)
    signs = np.where(rng.random(200_000) < density, rng.choice([-1, 1], 200_000), 0).astype(np.int8)
    bits = 8 * len(encode_signs(signs)) / signs.size
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density) + density
    assert entropy * 0.99 < bits < entropy * 1.03


@UNTIMED
@given(SIGNS.filter(len), st.binary(max_size=60), st.data())
def test_damaged_signs_are_refused_or_within_the_length(values: list[int], junk: bytes, data: st.DataObject) -> None:
    code = bytearray(encode_signs(np.array(values, np.int8)))
    at = data.draw(st.integers(0, len(code) - 1))
    code[at] ^= data.draw(st.integers(1, 255))
    for damaged in (bytes(code), bytes(code[:at]), bytes(code[:at]) + junk, junk):
        try:
            positions, signs = decode_signs(memoryview(damaged), len(values))
        except SourceError:
            continue
        assert len(positions) == len(signs) <= len(values)
        assert all(np.diff(positions) > 0) and all(0 <= position < len(values) for position in positions)


def test_a_code_that_states_many_positions_takes_no_memory() -> None:
    code = bytearray(golomb.encode(np.arange(3), 8))
    code[1:9] = b"\xff" * 8  # positions, and bytes of quotients
    with pytest.raises(SourceError, match="4,294,967,295 positions of 8"):
        golomb.decode(memoryview(bytes(code)), 8)


@UNTIMED
@given(st.binary(max_size=400), st.sampled_from([1, 2, 4, 8]))
def test_planes_come_back(content: bytes, item: int) -> None:
    raw = np.frombuffer(content[: len(content) // item * item], np.uint8)
    assert decode_planes(memoryview(encode_planes(raw, item)), raw.size, item).tobytes() == raw.tobytes()


@UNTIMED
@given(st.binary(min_size=8, max_size=80), st.data())
def test_planes_of_another_size_are_refused(content: bytes, data: st.DataObject) -> None:
    code = encode_planes(np.frombuffer(content, np.uint8), 1)
    for size in {len(content) - 1, len(content) + 1, 2**20}:
        with pytest.raises(SourceError, match="damaged"):
            decode_planes(memoryview(code), size, 1)
    with pytest.raises(SourceError, match="damaged"):
        decode_planes(memoryview(code[: data.draw(st.integers(0, len(code) - 1))]), len(content), 1)


@pytest.mark.parametrize("dtype", TYPES)
@UNTIMED
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_numbers_are_rounded_as_torch_rounds_them(dtype: str, numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    expected = torch.from_numpy(values).to(TYPES[dtype])
    raw = to_bytes(values, dtype)
    assert raw.tobytes() == expected.view(torch.uint8).numpy().tobytes()
    assert to_values(raw, dtype).tobytes() == expected.float().numpy().tobytes()
