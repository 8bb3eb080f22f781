"""`/v1/embeddings`: OpenAI's request, and its response.

One expert embeds all inputs of a request, since vectors of different models cannot be compared: the one that `model`
names, or the one that a policy chooses for all of them together. The response's `model` names it.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError
from pydantic_core import to_json

from coe.engines.embedding import Vectors
from coe.errors import InvalidRequest
from coe.policy import AUTO, Policy
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
from routers.base import EMBEDDING, Query

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
    """The field `coe`. experts: names that may embed; exclude: names that may not. deadline_s: seconds until the
    request is given up. priority: which waiting requests go first."""

    experts: Annotated[list[Name], Field(min_length=1, fail_fast=True)] | None = None
    exclude: Annotated[list[Name], Field(fail_fast=True)] | None = None
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
    own = fields.coe or EmbeddingExtension()
    request = GenerateRequest(
        prompt="",
        inputs=fields.input,
        wants="embedding",
        stream=False,
        deadline_s=own.deadline_s,
        priority=own.priority,
    )
    allowed = None if own.experts is None else frozenset(own.experts)
    return ParsedEmbedding(
        fields.model,
        request,
        Query(request.read, raw=True, needs=request.needs, allowed=allowed),
        ignored=tuple(sorted(name for name in IGNORED & whole.keys() if whole[name] is not None)),
        exclude=frozenset(own.exclude or ()),
        base64=fields.encoding_format == "base64",
        dimensions=fields.dimensions,
    )


def embedding_model(model: str, policies: Mapping[str, Policy], experts: Mapping[str, ExpertSpec]) -> str:
    """An expert, or a policy as `coe/<name>`: `auto` is the one policy that chooses among embedding models.

    Args:
        policies, experts: those that the caller may use.

    Raises:
        InvalidFields: it returns no embeddings, or `auto` is none or several policies; names what can be named instead.
    """
    able = {name: None for name, spec in experts.items() if EMBEDDING in spec.capabilities}  # in order
    if model == AUTO:
        found = [name for name, policy in policies.items() if _only_embeds(policy, experts, able)]
        if len(found) == 1:
            return RESERVED_PREFIX + found[0]
        many = "several policies choose" if found else "no policy chooses only"
        raise _no_vectors(f"{model!r} is routed, and {many} among embedding models", found, able)
    if model.startswith(RESERVED_PREFIX):
        policy = policies.get(model.removeprefix(RESERVED_PREFIX))
        if policy is None or not policy.experts or any(name in able for name in policy.experts):
            return model  # what does not exist is reported by routing
        usable = [name for name, policy in policies.items() if any(name in able for name in policy.experts)]
        raise _no_vectors(f"{model!r} chooses among experts that return no embeddings", usable, able)
    if model in experts and model not in able:
        raise _no_vectors(f"{model!r} returns no embeddings", [], able)
    return model


def embeds_only(model: str, policies: Mapping[str, Policy], experts: Mapping[str, ExpertSpec]) -> bool:
    """Whether an expert or `coe/<policy>` returns vectors and no text. Arguments as for `embedding_model`."""
    able = [name for name, spec in experts.items() if EMBEDDING in spec.capabilities]
    policy = policies.get(model.removeprefix(RESERVED_PREFIX)) if model.startswith(RESERVED_PREFIX) else None
    return model in able if policy is None else _only_embeds(policy, experts, able)


def _only_embeds(policy: Policy, experts: Mapping[str, ExpertSpec], able: Collection[str]) -> bool:
    known = [name for name in policy.experts if name in experts]
    return bool(known) and all(name in able for name in known)


def _no_vectors(why: str, policies: Collection[str], experts: Collection[str]) -> InvalidFields:
    names = [*(RESERVED_PREFIX + name for name in policies), *experts]
    instead = f"name one of {listing(names)}" if names else "no expert of kind 'embedding' is registered"
    return InvalidFields(FieldProblem("model", "unsupported_value", f"{why}: {instead}"))


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
