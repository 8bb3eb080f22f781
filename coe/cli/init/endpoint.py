"""The models of an OpenAI-compatible endpoint, as experts: GET /v1/models, bounded in time and size."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from coe.cli.init.found import Found
from coe.errors import ConfigError
from registry.spec import RESERVED_NAMES, RESERVED_PREFIX

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_MODELS = 50
_ASSUMED_CONTEXT = 8192
_MOST_CONTEXT = 2**30
_MOST_CHARACTERS = 256  # of a name


def list_models(url: str, api_key_env: str | None, timeout_s: float) -> tuple[list[Found], list[str]]:
    """The models that an endpoint lists, and notes on what it does not say.

    Raises:
        ConfigError: no answer within `timeout_s` seconds, or another one than a list of models.
    """
    base = _base_url(url)
    models = asyncio.run(_fetch(base, api_key_env, timeout_s))
    own = [one for one in models if one["id"] in RESERVED_NAMES or one["id"].startswith(RESERVED_PREFIX)]
    experts = [one for one in models if one not in own and _is_name(one["id"])]
    if not experts:
        raise ConfigError(f"{base}/models lists no model")
    notes = []
    if odd := len(models) - len(own) - len(experts):
        notes.append(f"{base}: {odd} models are left out, whose names are empty, too long, or hold control characters")
    if len(experts) > _MOST_MODELS:
        notes.append(f"{base} lists {len(experts)} models: the first {_MOST_MODELS} are written")
    found = [_expert(base, one, api_key_env) for one in experts[:_MOST_MODELS]]
    if assumed := [one.name for one in found if one.comment]:
        notes.append(
            f"{base} does not state the context length of {len(assumed)} models: {_ASSUMED_CONTEXT} tokens are written "
            "for each; correct them in the file"
        )
    return found, notes


def _base_url(url: str) -> str:
    """The URL without what follows `/v1`; with `/v1` where it has no path."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # a malformed port is a ValueError, too
    except ValueError:
        parts = urlsplit("")
    if not parts.hostname or not url.isprintable() or " " in url:
        raise ConfigError("is not a URL like https://host/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            "a URL with a user name, password or query is not accepted: leave it out, and name the environment "
            "variable with the key: --api-key-env NAME"
        )
    path = parts.path.rstrip("/").removesuffix("/models").removesuffix("/chat/completions") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


async def _fetch(base: str, api_key_env: str | None, timeout_s: float) -> Sequence[dict[str, Any]]:
    from openai import APIConnectionError, APIStatusError, OpenAIError

    from coe.engines.remote.client import open_client, whole_body
    from coe.engines.remote.events import MalformedStream
    from coe.engines.remote.limits import MOST_LIST_BYTES

    key = os.environ.get(api_key_env, "").strip() if api_key_env else ""
    if api_key_env and not key:
        raise ConfigError(f"the environment variable {api_key_env} is not set")
    by_hand = "`coe init` without arguments writes a template to list models by hand"
    try:
        async with (
            asyncio.timeout(timeout_s),
            open_client(base, key or "none", timeout_s=timeout_s, connect_s=timeout_s) as client,
            client.models.with_streaming_response.list() as response,
        ):
            body = await whole_body(response.iter_bytes(), MOST_LIST_BYTES)
    except TimeoutError:
        raise ConfigError(f"{base}/models did not answer within {timeout_s:g} s; {by_hand}") from None
    except APIStatusError as error:
        hint = "; name its key with --api-key-env NAME" if error.status_code in (401, 403) else ""
        if 300 <= error.status_code < 400:
            hint = ", a redirect, which is not followed: give the URL that it leads to"
        raise ConfigError(f"{base}/models answers with HTTP {error.status_code}{hint}") from None
    except APIConnectionError as error:
        cause = error.__cause__ or error
        raise ConfigError(
            f"{base} cannot be reached ({cause}): start it, or check the URL and network; {by_hand}"
        ) from None
    except (OpenAIError, MalformedStream) as error:
        raise ConfigError(f"{base}/models cannot be read: {error}") from None
    return _models(base, body)


def _models(base: str, body: bytes) -> list[dict[str, Any]]:
    try:
        listed = json.loads(body)["data"]
        return [one for one in listed if isinstance(one["id"], str)]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(
            f"{base}/models does not answer with a list of models: is it an OpenAI-compatible URL?"
        ) from None


def _is_name(name: str) -> bool:
    return 0 < len(name) <= _MOST_CHARACTERS and name.isprintable()


def _expert(base: str, model: dict[str, Any], api_key_env: str | None) -> Found:
    stated = next((model[key] for key in ("max_model_len", "context_length", "context_window") if key in model), None)
    known = type(stated) is int and 0 < stated <= _MOST_CONTEXT
    entry: dict[str, Any] = {
        "name": model["id"].rpartition("/")[2],
        "kind": "remote",
        "source": base,
        "model": model["id"],
        "context_length": stated if known else _ASSUMED_CONTEXT,
    }
    if api_key_env is not None:
        entry["api_key_env"] = api_key_env
    return Found(entry, comment="" if known else "context_length is an assumption")
