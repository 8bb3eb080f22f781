"""The two files of `coe init`, with comments for the person who reads them next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coe.cli.init.found import Found
from coe.errors import ConfigError
from registry.spec import Kind
from registry.storage import coe_home

_SPECIAL = set(",[]{}#&*!|>'\"%@`\n")
_MOST_COMMENT = 160
_EXPERTS_HEAD = """\
# The experts: what may answer. `coe config check` reads this file, docs/configuration.md explains every field.
# Sizes, context length, architecture and digest of local models are read from their files.
experts:
"""
_TEMPLATE_EXPERTS = """\
  - {name: echo, kind: model, source: "fake://echo"} # repeats the question: replace it by models of yours, such as

  # - name: general                        # requests address it by this name
  #   kind: model
  #   source: models/general               # a folder with config.json and safetensors, relative to this file
  #   description: Answers anything.
  # - name: small
  #   kind: model
  #   source: models/small.Q4_K_M.gguf     # a GGUF file; converted once, when it is first called
  # - name: hub
  #   kind: model
  #   source: hf://org/name                # a repository on the Hugging Face hub; downloaded at the first start
  # - name: sql
  #   kind: adapter                        # a LoRA adapter
  #   base: general                        # the model that it was trained on, in this file
  #   source: adapters/sql                 # a folder with adapter_config.json and safetensors
  # - name: big
  #   kind: remote
  #   source: https://llm.example.com/v1   # an OpenAI-compatible endpoint
  #   model: org/big-model                 # what the endpoint calls it
  #   api_key_env: BIG_API_KEY             # the environment variable with its key
  #   context_length: 131072
  #   price: {input_usd_per_mtok: 0.60, output_usd_per_mtok: 1.80}
"""


def experts_text(found: Sequence[Found], out: Path) -> str:
    """The experts file: models first, each adapter after its base. Sources in `out` or $COE_HOME become relative."""
    return _EXPERTS_HEAD + "\n".join(_expert_text(one, out.resolve()) for one in _in_order(found))


def config_text(found: Sequence[Found], experts_file: str) -> str:
    """The configuration: every request goes to one generalist until a router is trained.

    Raises:
        ConfigError: none of the experts can answer.
    """
    answering = [one for one in _in_order(found) if one.kind is not Kind.EMBEDDING]
    if not answering:
        raise ConfigError("these are embedding models only, which answer nothing: add a model that answers")
    generalist = next((one for one in answering if one.kind is not Kind.ADAPTER), answering[0]).name
    sizes = [one.facts.size_bytes for one in found if one.facts is not None]
    comment = f"# the models take {sum(sizes) / 2**30:.1f} GiB together" if sizes else "# for example"
    return _config(experts_file, generalist, f"{comment}; without a budget: 80% of the free memory")


def template_texts(experts_file: str) -> tuple[str, str]:
    """Both files without any model: they load, and the one expert repeats the question."""
    budget = "# without a budget: 80% of the free memory"
    return _EXPERTS_HEAD + _TEMPLATE_EXPERTS, _config(experts_file, "echo", budget)


def _config(experts_file: str, generalist: str, budget: str) -> str:
    name = _scalar(generalist)
    return f"""\
# A service: which experts, in how much memory, and how requests are routed. docs/configuration.md explains every key.
#   coe config check coe.yaml                  is everything right?
#   coe chat --config coe.yaml                 talk to it
#   coe serve --config coe.yaml                an OpenAI-compatible endpoint on http://127.0.0.1:8000/v1
experts: [{_scalar(experts_file)}]
# host: {{budget: 8GiB}} {budget}

policies:
  # What `model: auto` does. Before there is a router, one expert answers everything.
  default: {{expert: {name}}}

# From here to a router, which sends each request to the expert that answers it best:
#   1. Measure: write questions with right answers as tasks/mine.jsonl and tasks/mine.yaml (docs/first-steps.md), then
#        coe eval --config coe.yaml --tasks tasks --out runs/mine
#        coe outcomes check runs/mine/outcomes.parquet
#   2. Train:
#        coe router train --outcomes runs/mine/outcomes.parquet --kind auto --out router
#   3. Route: replace the policy above by
#        default: {{router: router, fallback: {name}}}
#      and look at a decision:
#        coe route "a question" --config coe.yaml --explain
"""


def _in_order(found: Sequence[Found]) -> list[Found]:
    adapters = [one for one in found if one.kind is Kind.ADAPTER]
    ordered: list[Found] = []
    for one in found:
        if one.kind is not Kind.ADAPTER:
            ordered += [one, *(each for each in adapters if each.entry.get("base") == one.name)]
    return ordered


def _expert_text(one: Found, out: Path) -> str:
    fields = {**one.entry, "source": _source(one, out)}
    lines = [f"    {name}: {_scalar(value)}\n" for name, value in fields.items()]
    comment = f"  # {_comment(one.comment)}\n" if one.comment else ""
    price = "    # price: {input_usd_per_mtok: 0.60, output_usd_per_mtok: 1.80}\n" if one.kind is Kind.REMOTE else ""
    return f'{comment}  - {lines[0].lstrip()}{"".join(lines[1:])}    description: "" # what it is good at\n{price}'


def _source(one: Found, out: Path) -> str:
    """Relative to the file where the model is inside its folder, `home://` under $COE_HOME, else as it is."""
    if one.path is None:
        return str(one.entry["source"])
    if one.path.is_relative_to(out):
        return one.path.relative_to(out).as_posix()
    home = coe_home().resolve()
    return f"home://{one.path.relative_to(home).as_posix()}" if one.path.is_relative_to(home) else str(one.path)


def _comment(text: str) -> str:
    """One bounded line: the text may come from a file that is not trusted."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return line if len(line) <= _MOST_COMMENT else f"{line[: _MOST_COMMENT - 3]}..."


def _scalar(value: Any) -> str:
    """A value in YAML: plain where that is safe, else quoted as JSON, with YAML escapes for invisible characters."""
    if isinstance(value, str) and _is_plain(value):
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in quoted)


def _is_plain(text: str) -> bool:
    """Whether YAML reads the text as itself without quotes."""
    from registry.documents import parse_document
    from registry.errors import InvalidSpec

    if not text or not text.isprintable() or set(text) & _SPECIAL:
        return False
    try:
        return bool(parse_document(text, Path("value")).value == text)
    except InvalidSpec:  # text that begins like a date, for example
        return False
