"""Prompt tokens by the experts' own tokenizers: each reads a prompt once, and none can stop the routing."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from coe import tokens
from coe.experts import tokenizer_file
from coe.tokens import TokenCounter, Tokenizers
from registry.errors import SourceError
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message, Query
from routers.tokens import TokenRange


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer with one token per word, that would cut and pad a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def expert(name: str, source: str, *, context_length: int | None = 100, **fields: Any) -> ExpertSpec:
    kind = Kind.ADAPTER if "base" in fields else Kind.REMOTE if source.startswith("http") else Kind.MODEL
    return ExpertSpec(name=name, kind=kind, source=source, context_length=context_length, **fields)


def counter(*specs: ExpertSpec, tokenizers: Tokenizers | None = None) -> TokenCounter:
    return TokenCounter(Snapshot(1, {spec.name: spec for spec in specs}), tokenizers or Tokenizers())


@pytest.fixture
def local(tmp_path: Path) -> ExpertSpec:
    write_tokenizer(tmp_path / "model")
    return expert("local", str(tmp_path / "model"))


def test_a_local_expert_counts_with_its_own_tokenizer(local: ExpertSpec) -> None:
    count = counter(local).of(Query.of(" ".join("x" * 40)))
    assert count("local") == TokenRange(39, 44, 80), "without its truncation; the template is a bound"
    assert counter(local).of(Query.of(" ".join("x" * 40), raw=True))("local") == TokenRange(39, 40, 40)


def test_an_adapter_counts_with_the_tokenizer_of_its_base_which_reads_a_prompt_once(
    local: ExpertSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Sequence[str]] = []
    original = Tokenizers.count

    def spy(self: Tokenizers, file: Path, texts: Sequence[str], enough: int) -> list[int] | None:
        read.append(texts)
        return original(self, file, texts, enough)

    monkeypatch.setattr(Tokenizers, "count", spy)
    adapters = [expert(f"adapter{i}", "elsewhere", base="local") for i in range(3)]
    count = counter(local, *adapters).of(Query.of("one two"))
    assert {count(name) for name in ("local", "adapter0", "adapter1", "adapter2")} == {TokenRange(1, 6, 42)}
    assert read == [["one two"]]


def test_fake_experts_count_words_and_others_nothing(tmp_path: Path) -> None:
    count = counter(
        expert("fake", "fake://echo"),
        expert("remote", "https://host/v1"),
        expert("gone", str(tmp_path / "gone")),
        expert("empty", str(tmp_path)),
    ).of(Query((Message("system", "be brief"), Message("user", "one two three"))))
    assert count("fake") == TokenRange(5, 5, 5)
    assert count("remote") is None and count("gone") is None and count("empty") is None


def test_the_lower_bound_leaves_out_what_a_template_may_drop(local: ExpertSpec) -> None:
    turns = (
        Message("user", "  one two  "),
        Message("assistant", "<think>a b c d e f</think> three four five"),
        Message("user", "<think>six seven</think> eight"),
    )
    count = counter(local).of(Query(turns))("local")
    assert count is not None and count.low == (2 - 1) + (3 - 1) + (3 - 1)


def test_counting_ends_once_a_context_is_exceeded(local: ExpertSpec) -> None:
    words = " ".join(["word"] * 200_000)
    count = counter(local).of(Query.of(words))("local")
    assert count is not None and 100 < count.low < 20_000


def test_a_changed_tokenizer_is_loaded_again_and_few_are_kept(tmp_path: Path) -> None:
    tokenizers = Tokenizers(most=2)
    files = [write_tokenizer(tmp_path / str(i)) for i in range(3)]
    assert [tokenizers.count(file, ["a b"], 100) for file in files] == [[2]] * 3
    assert len(tokenizers._loaded) == 2
    changed = files[2].read_text().replace("WhitespaceSplit", "Whitespace")
    files[2].write_text(changed)
    os.utime(files[2], ns=(1, 1))
    assert tokenizers.count(files[2], ["a.b"], 100) == [3]


def test_a_file_that_is_no_tokenizer_is_left_alone_for_a_while(
    tmp_path: Path, local: ExpertSpec, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    tokenizers, file = Tokenizers(clock=lambda: now[0]), Path(local.source, "tokenizer.json")
    good = file.read_text()
    file.write_text("{}")
    assert tokenizers.count(file, ["a"], 100) is None and "prompt tokens are estimated" in caplog.text
    file.write_text(good)
    assert tokenizers.count(file, ["a"], 100) is None
    now[0] = tokens.RETRY_S + 1
    assert tokenizers.count(file, ["a"], 100) == [1]
    monkeypatch.setattr(tokens, "MOST_FILE_BYTES", 10)
    assert tokenizers.count(file, ["a"], 100) is None, "too large to read"


def test_a_tokenizer_that_does_not_end_is_given_up(local: ExpertSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = threading.Event()

    class Endless:
        def encode(self, text: str, add_special_tokens: bool) -> None:
            ends.wait(30)

    monkeypatch.setattr(tokens, "_load", lambda file: Endless())
    tokenizers = Tokenizers(count_s=0.05)
    own = counter(local, tokenizers=tokenizers)
    assert own.of(Query.of("a"))("local") is None
    assert own.of(Query.of("a"))("local") is None
    assert sum(thread.name == "tokenizer" for thread in threading.enumerate()) == 1, "it is not called again"
    ends.set()


def test_only_a_query_near_a_limit_may_have_to_be_counted(local: ExpertSpec) -> None:
    remote, long = expert("remote", "https://host/v1"), expert("long", local.source, context_length=10_000)
    assert not counter(local).may_count(Query.of("hi")) and counter(local).may_count(Query.of("x" * 100))
    assert counter(local).may_count(Query.of("hi", max_tokens=80))
    assert not counter(local, long).may_count(Query.of("hi", max_tokens=5000)), "too long for one whatever the count"
    assert counter(local, long).may_count(Query.of("hi", max_tokens=9999))
    assert not counter(remote).may_count(Query.of("x" * 10_000)), "its tokenizer is not at hand"
    assert not counter(expert("endless", local.source, context_length=None)).may_count(Query.of("x" * 10_000))


def test_the_tokenizer_of_a_gguf_file_is_in_the_folder_of_its_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COE_HOME", str(tmp_path / "home"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    gguf = expert("gguf", str(tmp_path / "model.gguf"), digest="sha256:" + "a" * 64)
    assert tokenizer_file(gguf) is None, "no engine has converted it"
    (tmp_path / "home" / "converted").mkdir(parents=True)
    file = write_tokenizer(tmp_path / "home" / "converted" / ("a" * 32))
    assert tokenizer_file(gguf) == file
    assert counter(gguf).of(Query.of("one two", raw=True))("gguf") == TokenRange(1, 2, 2)
    assert tokenizer_file(gguf.model_copy(update={"digest": None})) is None


def test_files_of_the_hub_are_not_downloaded_to_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def download(source: str, stated: str | None, *, local_only: bool = False) -> Path:
        asked.append(local_only)
        raise SourceError("not in the cache")

    monkeypatch.setattr("registry.sources._download", download)
    assert counter(expert("hub", "hf://org/name")).of(Query.of("x" * 500))("hub") is None
    assert asked == [True]
