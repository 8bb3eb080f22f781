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
        ("/models/A.Q4_K_M.GGUF", SourceKind.GGUF),
        ("hf://org/name/A.GgUf", SourceKind.HUB),
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


def hub_cache(root: Path, name: str, content: Path) -> Path:
    """A file as the Hugging Face hub caches it: a relative link to one that is named by its hash."""
    blob = root / "blobs" / "3b9f7c0de1"
    blob.parent.mkdir(parents=True)
    content.replace(blob)
    link = root / "snapshots" / COMMIT / name
    link.parent.mkdir(parents=True)
    link.symlink_to(Path("../../blobs") / blob.name)
    return link


def test_a_link_to_a_gguf_file_keeps_its_name_and_digest(tmp_path: Path) -> None:
    plain = describe(spec(str(write_gguf(tmp_path / "M.GGUF"))))
    link = hub_cache(tmp_path / "cache", "M.GGUF", tmp_path / "M.GGUF")
    (tmp_path / "latest").symlink_to(link.parent)
    source = absolute_source("latest/M.GGUF", tmp_path)
    assert source == str(link) and resolve(spec(source)) == link
    described = describe(spec(source))
    assert (described.digest, described.files) == (plain.digest, plain.files)
    assert described.source == source and described.architecture == "llama"


def test_a_folder_may_hold_one_gguf_file(tmp_path: Path) -> None:
    link = hub_cache(tmp_path / "cache", "m.gguf", write_gguf(tmp_path / "m.gguf"))
    (link.parent / "mmproj-m.gguf").write_bytes(b"")
    (link.parent / "config.json").write_text("{}")
    assert resolve(spec(str(link.parent))) == link
    assert describe(spec(str(link.parent))).files[0].name == "m.gguf"
    write_gguf(link.parent / "m.Q8.GGUF")
    with pytest.raises(
        SourceError, match=r"holds 2 GGUF files \(m\.Q8\.GGUF, m\.gguf\): set the source to one of them"
    ):
        resolve(spec(str(link.parent)))
    folder = write_model(link.parent)  # safetensors are the model, whatever else is there
    assert resolve(spec(str(folder))) == folder


def test_content_decides_what_is_gguf(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "3b9f7c0de1")
    assert describe(spec(str(file))).architecture == "llama"
    (tmp_path / "no.gguf").write_text("no model")
    with pytest.raises(SourceError, match=r"no\.gguf is damaged or not GGUF: it does not start with 'GGUF'"):
        describe(spec(str(tmp_path / "no.gguf")))


def test_links_to_nowhere_and_in_circles_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").symlink_to("../blobs/gone")
    with pytest.raises(SourceError, match=r"m\.gguf \(a symbolic link to \.\./blobs/gone, which does not exist\)"):
        resolve(spec(absolute_source("m.gguf", tmp_path)))
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for source in ("a", "a/m.gguf"):
        with pytest.raises(SourceError, match="there is no"):
            resolve(spec(absolute_source(source, tmp_path)))


def test_folders_and_safetensors_behind_links(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "v1")
    plain = describe(spec(str(folder)))
    hub_cache(tmp_path / "cache", "model.safetensors", folder / "model.safetensors")
    snapshot = tmp_path / "cache" / "snapshots" / COMMIT
    for name in ("config.json", "tokenizer.json"):
        (folder / name).replace(snapshot / name)
    (tmp_path / "current").symlink_to("cache/snapshots/" + COMMIT)
    source = absolute_source("current", tmp_path)
    assert source == str(snapshot) and describe(spec(source)).digest == plain.digest
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/gone")
    with pytest.raises(SourceError, match=r"model\.safetensors is a symbolic link to \.\./\.\./blobs/gone"):
        describe(spec(source))


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
