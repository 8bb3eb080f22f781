from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from model_files import write_gguf, write_model

from registry.describe import describe
from registry.errors import DiskFull, SourceError
from registry.sources import SourceKind, absolute_source, has_files, pinned, resolve, source_kind
from registry.spec import ExpertSpec, Kind

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def spec(source: str, kind: Kind = Kind.MODEL, **fields: Any) -> ExpertSpec:
    return ExpertSpec(name="x", kind=kind, source=source, **fields)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("models/a", SourceKind.FOLDER),
        ("home://models/a", SourceKind.FOLDER),
        ("/models/a.gguf", SourceKind.GGUF),
        ("home://a.gguf", SourceKind.GGUF),
        ("hf://org/name@main", SourceKind.HUB),
        ("hf://org/name/a.gguf", SourceKind.HUB),
        ("https://host/v1", SourceKind.REMOTE),
        ("fake://echo", SourceKind.FAKE),
    ],
)
def test_kinds_of_sources(source: str, kind: SourceKind) -> None:
    assert source_kind(source) is kind


def test_unknown_schemes_say_what_there_is() -> None:
    with pytest.raises(SourceError, match="s3:// is not a source; use a path, home://.* or name the `engine`"):
        source_kind("s3://bucket/model")


def test_an_engine_reads_schemes_of_its_own() -> None:
    assert source_kind("s3://bucket/model", engine="bucket") is SourceKind.ENGINE
    assert source_kind("hf://org/name", engine="bucket") is SourceKind.HUB
    assert absolute_source("s3://bucket/model", Path("/conf")) == "s3://bucket/model"
    assert not has_files(spec("s3://bucket/model").model_copy(update={"engine": "bucket"}))
    assert has_files(spec("models/a").model_copy(update={"engine": "bucket"}))


def test_relative_paths_are_read_against_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert absolute_source("../a", tmp_path / "conf") == str(tmp_path / "a")
    assert absolute_source("/a/b", tmp_path) == "/a/b"
    assert absolute_source("~/a", tmp_path) == "/home/someone/a"
    for source in ("home://a", "hf://org/name", "https://host/v1", ""):
        assert absolute_source(source, tmp_path) == source


def test_local_places(tmp_path: Path, coe_home: Path) -> None:
    folder = write_model(coe_home / "models" / "a")
    file = write_gguf(tmp_path / "a.gguf")
    assert resolve(spec("home://models/a")) == resolve(spec(str(folder))) == folder
    assert resolve(spec(str(file))) == file
    with pytest.raises(SourceError, match=r"there is no folder .*/models/b"):
        resolve(spec("home://models/b"))
    with pytest.raises(SourceError, match=r"there is no file /b\.gguf"):
        resolve(spec("/b.gguf"))


@pytest.mark.parametrize("expert", [spec("fake://echo"), spec("https://h/v1", Kind.REMOTE)])
def test_some_experts_have_no_files(expert: ExpertSpec) -> None:
    assert not has_files(expert)
    with pytest.raises(SourceError, match="has no files of its own"):
        resolve(expert)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A substitute for the hub: its snapshot folder, and the requests it received."""
    asked: dict[str, Any] = {"error": None, "folder": tmp_path / "snapshots" / COMMIT}

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        if asked["error"] is not None:
            raise asked["error"]
        return str(asked["folder"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_repository_is_pinned_to_its_commit(hub: dict[str, Any]) -> None:
    write_model(hub["folder"])
    described = describe(spec("hf://org/some.name@v1"))
    assert (hub["repo"], hub["revision"]) == ("org/some.name", "v1")
    assert (described.source, described.revision) == ("hf://org/some.name", COMMIT)
    assert describe(described) == described and hub["revision"] == COMMIT
    assert describe(spec("hf://org/some.name", revision="v1")) == described


def test_nothing_that_runs_is_fetched(hub: dict[str, Any]) -> None:
    write_model(hub["folder"])
    resolve(spec("hf://org/name"))
    assert hub["revision"] is None
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in hub["allow_patterns"])


def test_one_gguf_of_a_repository(hub: dict[str, Any]) -> None:
    file = write_gguf_in(hub["folder"] / "q4" / "m.gguf")
    described = describe(spec("hf://org/name/q4/m.gguf@main"))
    assert resolve(described) == file and hub["allow_patterns"] == ["q4/m.gguf"]
    assert pinned("hf://org/name/q4/m.gguf@main", file) == ("hf://org/name/q4/m.gguf", COMMIT)
    assert (described.source, described.revision) == ("hf://org/name/q4/m.gguf", COMMIT)
    with pytest.raises(SourceError, match=r"org/name on the Hugging Face hub has no other\.gguf"):
        resolve(spec("hf://org/name/other.gguf"))


def write_gguf_in(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    return write_gguf(path)


@pytest.mark.parametrize("source", ["hf://name", "hf://org/name@", "hf://org/name/file.bin", "hf://../../x"])
def test_malformed_hub_sources(source: str) -> None:
    with pytest.raises(SourceError, match="is not hf://org/name"):
        resolve(spec(source))


def test_two_revisions_are_one_too_many(hub: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="name different revisions"):
        resolve(spec("hf://org/name@a", revision="b"))


RESPONSE = httpx2.Response(404, request=httpx2.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            hub_errors.GatedRepoError("x", response=RESPONSE),
            "is gated: accept its terms on its page, then set HF_TOKEN",
        ),
        (hub_errors.RepositoryNotFoundError("x", response=RESPONSE), "does not exist, or is private"),
        (
            hub_errors.RevisionNotFoundError("x", response=RESPONSE),
            r"name \(revision v9\) .*: the revision does not exist",
        ),
        (hub_errors.LocalEntryNotFoundError("x"), "cannot be reached .* and is not in the cache"),
        (hub_errors.OfflineModeIsEnabled("x"), "cannot be reached"),
        (httpx2.ReadTimeout("slow"), "cannot be downloaded: slow; run the command again to resume"),
        (hub_errors.HFValidationError("odd"), "cannot be downloaded: odd"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(hub: dict[str, Any], error: Exception, message: str) -> None:
    hub["error"] = error
    with pytest.raises(SourceError, match=message):
        resolve(spec("hf://org/name@v9"))


def test_a_download_that_does_not_fit(hub: dict[str, Any]) -> None:
    hub["error"] = OSError(28, "No space left on device")
    with pytest.raises(DiskFull):
        resolve(spec("hf://org/name"))


def test_without_a_network_the_hub_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"org/name \(revision main\) on the Hugging Face hub cannot be reached"):
        resolve(spec("hf://org/name"))
