"""`/v1/embeddings`: OpenAI's request, and its response.

An embedding is returned by the expert that `model` names: vectors of different models cannot be compared, so nothing is
routed and nothing falls back.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError
from pydantic_core import to_json

from coe.engines.embedding import Vectors
from coe.errors import InvalidRequest
from coe.policy import AUTO
from coe.protocol.errors import FieldProblem, InvalidFields
from coe.protocol.fields import Neutral
from coe.protocol.parsed import Parsed
from coe.protocol.problems import invalid, problem, refused
from coe.protocol.prompts import InputField
from coe.protocol.requests import request_object
from coe.protocol.texts import Name, Strict
from coe.types import Answer, GenerateRequest
from registry.priorities import RequestPriority
from registry.spec import RESERVED_PREFIX, ExpertSpec
from registry.spelling import listing
from routers.base import Query
from routers.constraints import EMBEDDING

MOST_DIMENSIONS: Final = 65_536
"""Most `dimensions`."""
MOST_NUMBERS: Final = 2**21
"""Most numbers of all vectors of a response together."""
REFUSED: Final[Mapping[str, Neutral]] = {
    "add_special_tokens": (None, True),
    "embed_dtype": (None, "float32"),
    "endianness": (None, "native", "little"),
    "normalize": (None, True),
    "priority": (None, 0),
    "truncate_prompt_tokens": (None,),
}
"""Fields that OpenAI does not have and vLLM and its clients send."""
IGNORED: Final = frozenset({"cache_salt", "request_id", "user"})


class EmbeddingExtension(Strict):
    """The field `coe`. deadline_s: seconds until the request is given up. priority: which waiting requests go first."""

    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    priority: RequestPriority | None = None


class EmbeddingFields(Strict):
    """Fields of `/v1/embeddings`."""

    model: Annotated[Name, Field(min_length=1)]
    input: InputField
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=MOST_DIMENSIONS)] | None = None
    coe: EmbeddingExtension | None = None


@dataclass(frozen=True, slots=True)
class ParsedEmbedding(Parsed):
    """A parsed request. base64: vectors as base64 of little-endian float32, else as numbers."""

    base64: bool = False
    dimensions: int | None = None


def parse_embedding(body: object) -> ParsedEmbedding:
    """The body of `/v1/embeddings`.

    Raises:
        InvalidRequest: it is not an object, or its fields are wrong: every problem at once.
    """
    whole = request_object(body)
    problems = list(refused(whole, REFUSED))
    given = {name: value for name, value in whole.items() if name not in REFUSED and name not in IGNORED}
    try:
        fields = EmbeddingFields.model_validate(given)
    except ValidationError as error:
        known = (*EmbeddingFields.model_fields, *REFUSED, *IGNORED)
        found = [partial(problem, detail, EmbeddingFields, known) for detail in error.errors(include_url=False)]
        raise invalid([*found, *problems]) from None
    if problems:
        raise invalid(problems)
    request = GenerateRequest(
        prompt="",
        inputs=fields.input,
        wants="embedding",
        stream=False,
        deadline_s=fields.coe.deadline_s if fields.coe else None,
        priority=fields.coe.priority if fields.coe else None,
    )
    return ParsedEmbedding(
        fields.model,
        request,
        Query.of("", raw=True, needs=request.needs),
        ignored=tuple(sorted(name for name in IGNORED & whole.keys() if whole[name] is not None)),
        base64=fields.encoding_format == "base64",
        dimensions=fields.dimensions,
    )


def check_embeds(model: str, experts: Mapping[str, ExpertSpec]) -> None:
    """Raises InvalidFields if `model` is a policy, or an expert that returns no embeddings. Names those that do."""
    is_policy = model == AUTO or model.startswith(RESERVED_PREFIX)
    if model not in experts and not is_policy:
        return  # it does not exist, which routing reports
    if not is_policy and EMBEDDING in experts[model].capabilities:
        return
    able = [name for name, spec in experts.items() if EMBEDDING in spec.capabilities]
    why = "is routed, and embeddings are not" if is_policy else "returns no embeddings"
    instead = f"name one of {listing(able)}" if able else "no expert of kind 'embedding' is registered"
    raise InvalidFields(FieldProblem("model", "unsupported_value", f"{model!r} {why}: {instead}"))


def check_size(vectors: Vectors) -> None:
    """Raises InvalidRequest if a response would have too many numbers."""
    if vectors.size > MOST_NUMBERS:
        count, dim = vectors.shape
        raise InvalidRequest(
            f"{count:,} vectors of {dim:,} numbers are more than {MOST_NUMBERS:,} numbers: send fewer inputs in one "
            "request"
        )


def embedding_pieces(vectors: Vectors, answer: Answer, *, base64: bool) -> Iterator[bytes]:
    """The JSON body in pieces, one for each vector: a large one is not written at once.

    Args:
        vectors: (n_inputs, dim) float32.
        answer: of the expert.
    """
    yield b'{"object":"list","data":['
    for i, vector in enumerate(vectors):
        shown = to_json(b64encode(vector.astype("<f4").tobytes()).decode() if base64 else vector.tolist())
        yield b'%s{"object":"embedding","index":%d,"embedding":%s}' % (b"," if i else b"", i, shown)
    usage = {"prompt_tokens": answer.usage.prompt_tokens, "total_tokens": answer.usage.prompt_tokens}
    yield b'],"model":%s,"usage":%s' % (to_json(answer.expert), to_json(usage))


def embedding_ending(more: Mapping[str, Any]) -> bytes:
    """The end of the body, with further fields."""
    return (b"," + to_json(more)[1:]) if more else b"}"
