"""Bodies of `/v1/embeddings`; the answers are in tests/coe/serve/test_serve_embeddings.py."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from coe.engines.embedding import read_vectors, shortened, vectors_chunk
from coe.errors import EngineError, InvalidRequest, Rejected
from coe.protocol.bounds import MOST_PROMPT_IDS
from coe.protocol.embeddings import embedding_ending, embedding_pieces, parse_embedding
from coe.protocol.errors import InvalidFields
from coe.types import Answer, Usage


def test_a_body_is_one_request_for_all_inputs() -> None:
    parsed = parse_embedding({"model": "m", "input": [[1, 2], [3]], "encoding_format": "base64", "user": "u"})
    assert parsed.request.inputs == ((1, 2), (3,)) and parsed.request.wants == "embedding"
    assert (parsed.base64, parsed.dimensions, parsed.ignored, parsed.stream) == (True, None, ("user",), False)
    assert parsed.query.needs == {"embedding", "token_prompts"} and parsed.size == 1
    assert parse_embedding({"model": "m", "input": "a", "coe": {"deadline_s": 2}}).request.deadline_s == 2


def test_token_ids_are_counted_over_all_inputs() -> None:
    half = [1] * (MOST_PROMPT_IDS // 2)
    assert len(parse_embedding({"model": "m", "input": [half, half]}).request.inputs) == 2
    with pytest.raises(InvalidFields, match="has 131,073 token ids, at most 131,072 are read"):
        parse_embedding({"model": "m", "input": [half, [*half, 1]]})
    with pytest.raises(InvalidFields, match="has 131,073 elements, at most 131,072 are read"):
        parse_embedding({"model": "m", "input": [1] * (MOST_PROMPT_IDS + 1)})


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(InvalidFields) as error:
        parse_embedding({"input": "", "dimensions": "x", "endianness": "big", "models": "m"})
    places = [problem.param for problem in error.value.problems]
    assert sorted(places) == ["dimensions", "endianness", "input", "model", "models"]
    for body in (None, [], "x"):
        with pytest.raises(InvalidRequest, match="must be a JSON object"):
            parse_embedding(body)


@pytest.mark.parametrize("base64", [True, False])
def test_the_pieces_of_a_body_are_one_json_document(base64: bool) -> None:
    vectors = np.array([[1, 0.5], [0.25, -1]], np.float32)
    answer = Answer('a "b"', "", "stop", Usage(3, 0))
    for more in ({}, {"coe": {"notes": []}}):
        body: Any = json.loads(b"".join(embedding_pieces(vectors, answer, base64=base64)) + embedding_ending(more))
        assert body["model"] == 'a "b"' and body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        assert [one["index"] for one in body["data"]] == [0, 1] and body.get("coe") == more.get("coe")
        assert base64 or [one["embedding"] for one in body["data"]] == vectors.tolist()


def test_vectors_of_engines_are_checked() -> None:
    vectors = np.array([[3, 4, 0], [0, 0, 1]], np.float32)
    value = vectors_chunk(vectors, 5).value
    assert np.array_equal(read_vectors(value, 2, expert="m"), vectors)
    for wrong in (None, b"", b"12345"):
        with pytest.raises(EngineError, match="'m' returned no vectors"):
            read_vectors(wrong, 2, expert="m")
    with pytest.raises(EngineError, match="not finite"):
        read_vectors(np.array([np.nan, 1], "<f4").tobytes(), 2, expert="m")
    assert np.allclose(shortened(vectors, 2, expert="m"), [[0.6, 0.8], [0, 0]])
    assert shortened(vectors, 3, expert="m") is vectors
    with pytest.raises(Rejected, match="dimensions is 4, and the vectors of 'm' have 3"):
        shortened(vectors, 4, expert="m")
