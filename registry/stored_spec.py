"""Reads the specs of the database, those of earlier versions included."""

from __future__ import annotations

import json
import logging

from pydantic import ValidationError

from registry.errors import StoreError
from registry.spec import ExpertSpec, without_credentials

logger = logging.getLogger(__name__)
_CLEANED = ("source", "model")


def read_spec(text: str) -> ExpertSpec:
    """The spec of a JSON text.

    Earlier versions accepted a user name and password in a URL. They are left out, with a warning: a service must
    start, and its clients must not be able to read them.

    Raises:
        StoreError: this version cannot read the spec; with the reason.
    """
    try:
        return ExpertSpec.model_validate_json(text)
    except ValidationError as error:
        failure = error
    document = json.loads(text)
    cleaned = {field: without_credentials(document[field]) for field in _CLEANED if document.get(field)}
    try:
        spec = ExpertSpec.model_validate_json(json.dumps(document | cleaned))
    except ValidationError:
        reasons = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in failure.errors())
        raise StoreError(
            f"the registered expert {document.get('name')!r} cannot be read by this version ({reasons}): remove "
            "it with the version that registered it, and register it again"
        ) from failure
    logger.warning(
        "expert %r is registered with a user name or password in its URL, which is left out: remove it, and register "
        "it again with the environment variable of its key as `api_key_env`",
        spec.name,
    )
    return spec
