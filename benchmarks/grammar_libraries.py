"""Libraries for constrained decoding compared: llguidance (which `hf` experts use), xgrammar and outlines-core.

    python benchmarks/grammar_libraries.py MODEL_DIR ... [--only speed keywords hostile] [--json PATH]

A library that is not installed is skipped (`pip install xgrammar outlines-core`, in an environment of its own: xgrammar
requires triton). Each case runs in a process of its own with one thread, for at most `--seconds` and 8 GiB.

speed     ms to compile each schema (median of up to 20), and ms of a mask per token: p50 and p99 of the first
          answer with a compiled schema, and of nine later ones
keywords  whether the keywords of JSON Schema are enforced (a valid text is accepted, an invalid one is not), refused
          with an error, ignored (the invalid text is accepted), or wrong (the valid text is not accepted)
hostile   outcome, seconds and MiB beyond those of the tokenizer. "checked" is llguidance with the limits of the `hf`
          engine, which first compiles in a process of limited time and memory
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import importlib.metadata
import json
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from grammar_cases import HOSTILE, INSTANCES, KEYWORDS, SCHEMAS, having


class LLGuidance:
    """The adapter of a library: compiles a schema, and follows an answer token by token."""

    packages = ("llguidance",)

    def __init__(self, tokenizer: Any, n_tokens: int) -> None:
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        self._matcher, self._of_library = LLMatcher, from_tokenizer(tokenizer, n_vocab=n_tokens)
        self._bits = np.zeros((n_tokens + 31) // 32, dtype=np.int32)

    def compile(self, schema: str) -> Any:
        options = {"coerce_one_of": False, "lenient": False}
        return self._checked(self._matcher.grammar_from_json_schema(schema, overrides=options))

    def _checked(self, grammar: str, **limits: Any) -> Any:
        compiled = self._matcher(self._of_library, grammar, log_level=0, **limits)
        if compiled.is_error():
            raise ValueError(compiled.get_error())
        return compiled

    def start(self, compiled: Any) -> Any:
        return compiled.deep_copy()

    def mask(self, state: Any) -> None:
        state.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)

    def accept(self, state: Any, token: int) -> bool:
        return bool(state.consume_token(token))

    def complete(self, state: Any) -> bool:
        return bool(state.is_accepting())


class Checked(LLGuidance):
    def __init__(self, tokenizer: Any, n_tokens: int) -> None:
        from coe.engines.constrained.checker import GrammarChecker

        super().__init__(tokenizer, n_tokens)
        self._checker = GrammarChecker()
        self._checker.problem('start: ""')  # starts its process

    def _checked(self, grammar: str, **_: Any) -> Any:
        from coe.engines.constrained.checker import SlowGrammar
        from coe.engines.constrained.compiler import _limits

        try:
            problem = self._checker.problem(grammar)
        except SlowGrammar:
            problem = self._checker.slow_problem(grammar)
        if problem:
            raise ValueError(problem)
        return super()._checked(grammar, limits=_limits())


class XGrammar:
    packages = ("xgrammar", "apache-tvm-ffi")

    def __init__(self, tokenizer: Any, n_tokens: int) -> None:
        import xgrammar

        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=n_tokens)
        self._library, self._end = xgrammar, tokenizer.eos_token_id
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._bits = xgrammar.allocate_token_bitmask(1, n_tokens)

    def compile(self, schema: str) -> Any:
        return self._compiler.compile_json_schema(schema, strict_mode=False)  # strict adds keywords

    def start(self, compiled: Any) -> Any:
        return self._library.GrammarMatcher(compiled)

    def mask(self, state: Any) -> None:
        state.fill_next_token_bitmask(self._bits, 0)

    def accept(self, state: Any, token: int) -> bool:
        return bool(state.accept_token(token))

    def complete(self, state: Any) -> bool:
        return bool(state.accept_token(self._end))


class Outlines:
    packages = ("outlines-core",)

    def __init__(self, tokenizer: Any, n_tokens: int) -> None:
        from llguidance.hf import from_tokenizer
        from outlines_core import Vocabulary

        tokens, ids = from_tokenizer(tokenizer, n_vocab=n_tokens), {}
        for i in range(n_tokens):
            if not tokens.is_special_token(i) and (data := tokens.decode_bytes([i])):
                ids.setdefault(data, []).append(i)
        self._vocabulary = Vocabulary(tokenizer.eos_token_id, ids)
        self._bits = np.zeros((n_tokens + 31) // 32, dtype=np.int32)

    def compile(self, schema: str) -> Any:
        from outlines_core import Index
        from outlines_core.json_schema import build_regex_from_schema

        return Index(build_regex_from_schema(schema), self._vocabulary)

    def start(self, compiled: Any) -> Any:
        from outlines_core import Guide

        return Guide(compiled)

    def mask(self, state: Any) -> None:
        state.write_mask_into(self._bits.ctypes.data, self._bits.size, 4)

    def accept(self, state: Any, token: int) -> bool:
        if allowed := state.accepts_tokens([token]):
            state.advance(token, return_tokens=False)
        return bool(allowed)

    def complete(self, state: Any) -> bool:
        return bool(state.is_finished())


LIBRARIES: dict[str, Any] = {"llguidance": LLGuidance, "checked": Checked, "xgrammar": XGrammar, "outlines": Outlines}
CASES = {"speed": list(SCHEMAS), "keywords": ["all"], "hostile": list(HOSTILE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="only the first one is used for keywords and hostile")
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--seconds", type=int, default=60, help="CPU time of a case")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.models[0], *given.child, given.seconds)))
        return
    names = [name for name in LIBRARIES if installed(name)]
    found = [row for part in given.only for row in measure(part, names, given.models, given.seconds)]
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def installed(name: str) -> bool:
    """Whether the library is; prints its version, licence and size, or why it is skipped."""
    try:
        packages = [importlib.metadata.distribution(each) for each in LIBRARIES[name].packages]
    except importlib.metadata.PackageNotFoundError as error:
        print(f"{name}: skipped, the package {error.name} is not installed")
        return False
    for package in packages:
        licence = package.metadata.get("License-Expression") or package.metadata.get("License")
        size = sum(file.size or 0 for file in package.files or ()) / 2**20
        print(f"{name}: {package.name} {package.version}, {licence}, {size:.1f} MiB installed")
    return True


def measure(part: str, names: list[str], models: list[Path], seconds: int) -> list[dict[str, Any]]:
    """The results of one part, printed as they come."""
    rows = []
    for model in models if part == "speed" else models[:1]:
        for case in CASES[part]:
            for name in names:
                row = {"model": model.name, "library": name, "case": case, **in_child(model, part, name, case, seconds)}
                rows.append(row)
                shown = {key: value for key, value in row.items() if key != "keywords"}
                print(
                    " | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in shown.values())
                )
    if part == "keywords":
        show_keywords(rows)
    sys.stdout.flush()
    return rows


def show_keywords(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        counts = Counter(row.get("keywords", {}).values())
        print(row["library"], ", ".join(f"{outcome} {n}" for outcome, n in counts.most_common()), f"of {len(KEYWORDS)}")
    for keyword in KEYWORDS:
        print(f"| {keyword} |", " | ".join(row.get("keywords", {}).get(keyword, "-") for row in rows), "|")


def in_child(model: Path, part: str, name: str, case: str, seconds: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, str(model), "--child", part, name, case]
    ended = subprocess.run([*command, "--seconds", str(seconds)], capture_output=True, text=True, check=False)
    if ended.returncode == 0:
        return dict(json.loads(ended.stdout.splitlines()[-1]))
    if ended.returncode == -signal.SIGPROF:
        return {"outcome": f"not within {seconds} s of CPU time"}
    last = (ended.stderr.strip().splitlines() or [""])[-1]
    return {"outcome": f"the process ended with {ended.returncode}: {last:.100}"}


def child(model: Path, part: str, name: str, case: str, seconds: int) -> dict[str, Any]:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    library = LIBRARIES[name](tokenizer, AutoConfig.from_pretrained(model).vocab_size)
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process

    def encode(value: Any) -> list[list[int]]:
        """Token ids with spaces after separators, and without."""
        texts = json.dumps(value), json.dumps(value, separators=(",", ":"))
        return [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]

    if part == "speed":
        return speed(library, json.dumps(SCHEMAS[case]), encode(INSTANCES[case])[0])
    if part == "keywords":
        return {"keywords": {keyword: outcome(library, keyword, encode) for keyword in KEYWORDS}}
    return hostile(library, HOSTILE[case](), encode({"e": "ab" * 300})[0])


def follow(library: Any, compiled: Any, tokens: list[int]) -> tuple[bool, list[float]]:
    """Whether an answer is accepted, and the milliseconds of each mask."""
    state, times = library.start(compiled), []
    for token in tokens:
        began = time.perf_counter()
        library.mask(state)
        times.append(1e3 * (time.perf_counter() - began))
        if not library.accept(state, token):
            return False, times
    return library.complete(state), times


def speed(library: Any, schema: str, tokens: list[int]) -> dict[str, Any]:
    times: list[float] = []
    while len(times) < 20 and sum(times) < 10:
        began = time.perf_counter()
        compiled = library.compile(schema)
        times.append(time.perf_counter() - began)
    accepted, first = follow(library, compiled, tokens)
    later = [ms for _ in range(9) for ms in follow(library, compiled, tokens)[1]]
    p50, p99, p50_later, p99_later = (float(np.quantile(ms, q)) for ms in (first, later) for q in (0.5, 0.99))
    figures = {"first_p50_ms": p50, "first_p99_ms": p99, "later_p50_ms": p50_later, "later_p99_ms": p99_later}
    compile_ms = 1e3 * statistics.median(times)
    return {"outcome": "accepted" if accepted else "not accepted", "compile_ms": compile_ms, **figures}


def outcome(library: Any, keyword: str, encode: Callable[[Any], list[list[int]]]) -> str:
    schema, valid, invalid = KEYWORDS[keyword]
    try:
        compiled = library.compile(having(schema))
    except BaseException as error:  # a panic of Rust is no Exception
        return "refused" if str(error) else "refused without a message"
    accepts = [
        any(follow(library, compiled, tokens)[0] for tokens in encode({"e": value})) for value in (valid, invalid)
    ]
    return "wrong" if not accepts[0] else "ignored" if accepts[1] else "enforced"


def hostile(library: Any, schema: str, tokens: list[int]) -> dict[str, Any]:
    before, began = peak_mib(), time.perf_counter()
    try:
        compiled = library.compile(schema)
        compiled_s = time.perf_counter() - began
        masks = follow(library, compiled, tokens)[1]
        result = f"compiled in {compiled_s:.3f} s; slowest mask {max(masks):.0f} ms of {len(masks)}"
    except BaseException as error:  # a panic of Rust is no Exception
        result = f"refused: {' '.join(str(error).split()):.100}"
    return {"outcome": result, "seconds": time.perf_counter() - began, "mib": peak_mib() - before}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
