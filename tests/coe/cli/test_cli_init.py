"""`coe init` writes an experts file and a configuration that load and answer without further edits."""

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import ModelInfo
from model_files import write_adapter, write_gguf, write_model
from typer.testing import CliRunner

from coe.cli.app import app
from coe.config import load_config
from coe.errors import CoeError
from coe.local import open_local
from registry.errors import RegistryError


def init(*words: object, ok: bool = True) -> Any:
    result = CliRunner().invoke(app, ["init", *map(str, words)])
    assert (result.exit_code == 0) is ok, result.output
    return result


def experts_in(folder: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in yaml.safe_load((folder / "experts.yaml").read_text())["experts"]}


@contextmanager
def endpoint(body: bytes, status: int = 200, *, delay_s: float = 0.0, **headers: str) -> Iterator[str]:
    """An endpoint that answers every GET alike and records the API keys it receives."""
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("Authorization", "")))
            stop.wait(delay_s)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    seen: list[tuple[str, str]] = []
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen = seen  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            stop.set()
            server.shutdown()
            thread.join()


def test_the_template_loads_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "wrote experts.yaml" in init().stderr
    checked = CliRunner().invoke(app, ["config", "check"])
    assert checked.exit_code == 0 and "coe.yaml is valid: 1 experts, policies default" in checked.stdout
    answered = CliRunner().invoke(app, ["ask", "say this", "--config", "coe.yaml"])
    assert answered.exit_code == 0 and answered.stdout.strip() == "say this"


def test_the_template_names_every_kind_of_expert_in_comments_that_are_right(tmp_path: Path) -> None:
    init("--out", tmp_path)
    text = (tmp_path / "experts.yaml").read_text()
    commented = [line.removeprefix("  # ") for line in text.splitlines() if line.startswith("  # ")]
    entries = yaml.safe_load("\n".join(commented))
    assert [entry["kind"] for entry in entries] == ["model", "model", "model", "adapter", "remote"]
    from registry.spec import ExpertSpec

    assert [ExpertSpec.model_validate(entry).name for entry in entries] == ["general", "small", "hub", "sql", "big"]


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    (tmp_path / "coe.yaml").write_text("mine")
    assert "exist" in init("--out", tmp_path, ok=False).output
    assert (tmp_path / "coe.yaml").read_text() == "mine" and not (tmp_path / "experts.yaml").exists()
    init("--out", tmp_path, "--force")
    assert (tmp_path / "coe.yaml").read_text() != "mine"


def test_models_and_adapters_of_folders(tmp_path: Path) -> None:
    write_model(tmp_path / "models" / "Base Model")
    write_adapter(tmp_path / "adapters" / "sql")
    init(tmp_path / "adapters", tmp_path / "models", "--out", tmp_path)
    entries = experts_in(tmp_path)
    assert entries["base-model"] == {
        "name": "base-model", "kind": "model", "source": "models/Base Model", "description": "",
    }  # fmt: skip
    assert entries["sql"]["kind"] == "adapter" and entries["sql"]["base"] == "base-model"
    assert list(entries) == ["base-model", "sql"], "an adapter follows its base"
    config = load_config(tmp_path / "coe.yaml")
    assert config.policies["default"].expert == "base-model"


def test_the_base_is_found_where_the_adapter_says_it_is(tmp_path: Path, coe_home: Path) -> None:
    write_model(coe_home / "models" / "Base-7B")
    write_adapter(tmp_path / "sql", base_model_name_or_path="org/base-7b")
    service = tmp_path / "service"
    result = init(tmp_path / "sql", "--out", service)
    assert "is added: the base of sql" in result.stderr
    assert experts_in(service)["base-7b"]["source"] == "home://models/Base-7B"
    assert experts_in(service)["sql"]["base"] == "base-7b"


def test_a_base_on_the_hub_is_named_and_not_downloaded(tmp_path: Path) -> None:
    write_adapter(tmp_path / "sql", base_model_name_or_path="org/elsewhere")
    init(tmp_path / "sql", "--out", tmp_path)
    assert experts_in(tmp_path)["elsewhere"]["source"] == "hf://org/elsewhere"


def test_a_repository_on_the_hub_is_a_model_or_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model_info(self: object, repo: str, **_: object) -> ModelInfo:
        if repo == "org/gone":
            raise hub_errors.OfflineModeIsEnabled("no network")
        names = ["adapter_config.json"] if repo == "org/sql-lora" else ["config.json"]
        return ModelInfo(id=repo, siblings=[{"rfilename": name} for name in names])

    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(config))
    result = init("org/base", "hf://org/sql-lora", "org/gone", "--out", tmp_path)
    entries = experts_in(tmp_path)
    assert (entries["base"]["kind"], entries["sql-lora"]["kind"]) == ("model", "adapter")
    assert entries["sql-lora"]["base"] == "base" and entries["gone"]["source"] == "hf://org/gone"
    assert "org/gone is taken as a model" in result.stderr


def test_the_models_of_an_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [{"id": "org/Big", "max_model_len": 4096}, {"id": "small"}, {"id": "auto"}, {"id": "coe/default"}]
    monkeypatch.setenv("A_KEY", "secret")
    with endpoint(json.dumps({"data": models}).encode()) as url:
        result = init(url, "--api-key-env", "A_KEY", "--out", tmp_path)
    entries = experts_in(tmp_path)
    assert list(entries) == ["big", "small"]
    assert entries["big"] == {
        "name": "big", "kind": "remote", "source": f"{url}/v1", "model": "org/Big", "context_length": 4096,
        "api_key_env": "A_KEY", "description": "",
    }  # fmt: skip
    assert "does not state the context length of 1 models" in result.stderr
    assert "secret" not in (tmp_path / "experts.yaml").read_text()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{}", 401, "HTTP 401; name its key with --api-key-env"),
        (b"<html>", 200, "does not answer with a list of models"),
        (b'{"data": []}', 200, "lists no model"),
        (b" " * (9 * 2**20), 200, "more than 8 MiB"),
    ],
)
def test_an_endpoint_that_is_none(tmp_path: Path, body: bytes, status: int, words: str) -> None:
    with endpoint(body, status) as url:
        result = init(url, "--out", tmp_path, ok=False)
    assert isinstance(result.exception, CoeError) and words in str(result.exception)
    assert not (tmp_path / "coe.yaml").exists()


def test_a_redirect_of_an_endpoint_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    trap = json.dumps({"data": [{"id": "trap"}]}).encode()
    with endpoint(trap) as other, endpoint(b"", 307, location=f"{other}/v1/models") as url:
        result = init(url, "--api-key-env", "A_KEY", "--out", tmp_path, ok=False)
    assert "a redirect, which is not followed" in str(result.exception)
    assert not (tmp_path / "experts.yaml").exists()


def test_an_endpoint_that_does_not_answer_is_left_in_time(tmp_path: Path) -> None:
    with endpoint(b"", delay_s=30) as url:
        result = init(url, "--timeout", "0.2", "--out", tmp_path, ok=False)
    assert "did not answer within 0.2 s" in str(result.exception)
    result = init("http://127.0.0.1:1", "--out", tmp_path, ok=False)
    assert "cannot be reached" in str(result.exception) and "`coe init` without arguments" in str(result.exception)


def test_all_wrong_arguments_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    error = str(init("nope", tmp_path / "empty", tmp_path / "notes.txt", "--out", tmp_path, ok=False).exception)
    assert len(error.splitlines()) == 3
    assert "nope: there is no such file" in error and "neither config.json" in error and "nor a .gguf" in error


def test_an_adapter_whose_base_cannot_be_found(tmp_path: Path) -> None:
    write_adapter(tmp_path / "sql", base_model_name_or_path="")
    error = str(init(tmp_path / "sql", "--out", tmp_path, ok=False).exception)
    assert "the base of this adapter is not among the arguments" in error


def test_names_are_such_as_the_registry_takes(tmp_path: Path) -> None:
    reserved = init("fake://auto", "--out", tmp_path / "reserved", ok=False).output  # written, and checked
    assert (
        list(experts_in(tmp_path / "reserved")) == ["expert-auto"] and "'fake://auto' is not a fake expert" in reserved
    )
    init("fake://script?x=1", "fake://script?x=2", "--out", tmp_path)
    assert list(experts_in(tmp_path)) == ["script", "script-2"]

    async def ask() -> str:
        async with open_local(tmp_path / "coe.yaml") as system:
            return await system.ask("hello")

    assert asyncio.run(ask()) == "hello"


def test_json_is_alone_on_stdout(tmp_path: Path) -> None:
    document = json.loads(init("fake://echo", "--out", tmp_path, "--json", "-").stdout)
    assert document["experts"] == [{"name": "echo", "kind": "model", "source": "fake://echo"}]
    assert document["files"] == [str(tmp_path / "experts.yaml"), str(tmp_path / "coe.yaml")]


def test_text_of_a_model_cannot_add_lines_to_the_file(tmp_path: Path) -> None:
    evil = "Llama\n  - {name: evil, kind: remote}\r\x1b[31m\u2028" + "x" * 500
    write_model(tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": [evil]}))
    init(tmp_path / "m", "--out", tmp_path)
    assert list(experts_in(tmp_path)) == ["m"]
    text = (tmp_path / "experts.yaml").read_text()
    assert all(character.isprintable() or character == "\n" for character in text)
    assert max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://bob:hunter2@127.0.0.1:1/v1", "--api-key-env NAME"),
        ("http://bob:?hunter2@127.0.0.1:1/v1", "--api-key-env NAME"),
        ("http://127.0.0.1:1/v1?key=hunter2", "--api-key-env NAME"),
        ("http://[::1", "is not a URL like"),
        ("http://host:port/v1", "is not a URL like"),
        ("hf://", "is not hf://org/name"),
        ("hf:///", "is not hf://org/name"),
        ("hf://a/b@", "is not hf://org/name"),
        ("hf://../..", "is not hf://org/name"),
        ("", "an empty argument"),
        ("x" * 300, "there is no such file"),
        ("~no-such-user/x", "there is no such user"),
        ("/dev/null", "is a pipe, socket or device"),
    ],
)
def test_arguments_that_are_nothing(tmp_path: Path, url: str, words: str) -> None:
    error = init(url, "--out", tmp_path, ok=False).exception
    assert isinstance(error, CoeError) and words in str(error) and len(str(error).splitlines()) == 1
    assert "bob" not in str(error) and "hunter2" not in str(error) and not list(tmp_path.iterdir())


def test_pipes_are_refused_without_opening_them(tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "m").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe.gguf")
    os.mkfifo(models / "m" / "config.json")
    error = str(init(tmp_path / "pipe.gguf", models, "--out", tmp_path, ok=False).exception)
    assert "pipe.gguf: is a pipe, socket or device" in error and "no GGUF file, model or adapter inside" in error
    os.mkfifo(models / "x.gguf")
    assert "x.gguf is a pipe" in str(init(models, "--out", tmp_path, ok=False).exception)


def test_odd_names_of_folders_are_quoted_or_left_out(tmp_path: Path) -> None:
    names = ["a\nb", "\x7f\x85\u2028", "2020-99-99", "é: #1", "\U0001f600"]
    for name in names:
        write_model(tmp_path / "models" / name)
    (tmp_path / "models" / os.fsdecode(b"\xff")).mkdir()
    result = init(tmp_path / "models", "--out", tmp_path)
    assert {Path(entry["source"]).name for entry in experts_in(tmp_path).values()} == set(names)
    assert "is left out: the name is not valid UTF-8" in result.stderr


@pytest.mark.parametrize("base", ["/dev/null", "~no-such-user/x", "a\0b/c", "x" * 600, "http://bob:hunter2@h/v1"])
def test_an_adapter_with_a_hostile_base_is_one_problem(tmp_path: Path, base: str) -> None:
    write_adapter(tmp_path / "sql", base_model_name_or_path=base)
    error = init(tmp_path / "sql", "--out", tmp_path, ok=False).exception
    assert isinstance(error, CoeError) and f"{tmp_path / 'sql'}: the base of this adapter" in str(error)
    assert "hunter2" not in str(error) and len(str(error)) < 400


def test_embedding_models_alone_are_no_service(tmp_path: Path) -> None:
    write_model(tmp_path / "vectors")
    (tmp_path / "vectors" / "modules.json").write_text("[]")
    error = init(tmp_path / "vectors", "--out", tmp_path / "out", ok=False).exception
    assert isinstance(error, CoeError) and "embedding models only" in str(error)


@pytest.mark.parametrize("stated", [True, 10**30, -1, "4096"])
def test_a_context_length_that_is_none_is_not_written(tmp_path: Path, stated: object) -> None:
    models = [{"id": "a", "context_length": stated}, {"id": "b\n\u0085"}, {"id": "\ud800"}, {"id": "x" * 1000}]
    with endpoint(json.dumps({"data": models}).encode()) as url:
        result = init(url, "--out", tmp_path)
    assert "3 models are left out" in result.stderr
    assert {name: entry["context_length"] for name, entry in experts_in(tmp_path).items()} == {"a": 8192}


@pytest.mark.parametrize("out", ["/dev/null", "/proc/x", "x" * 300])
def test_a_place_that_cannot_be_written_is_one_line(out: str) -> None:
    error = init("--out", out, ok=False).exception
    assert isinstance(error, CoeError | RegistryError) and len(str(error).splitlines()) == 1


def test_a_folder_is_not_overwritten_nor_the_files_by_json(tmp_path: Path) -> None:
    assert "is one of the files" in init("--out", tmp_path, "--json", tmp_path / "coe.yaml", ok=False).output
    (tmp_path / "coe.yaml").mkdir()
    assert "is a folder" in init("--out", tmp_path, "--force", ok=False).output
    assert not (tmp_path / "experts.yaml").exists()


def test_gguf_files_of_the_hubs_cache_keep_their_names(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0c1d"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_gguf(blobs / "3b9f")
    for name in ("Small.GGUF", "mid.Gguf"):
        (snapshot / name).symlink_to("../../blobs/3b9f")
    init(snapshot, blobs / "3b9f", "--out", tmp_path)
    found = {name: entry["source"] for name, entry in experts_in(tmp_path).items()}
    assert found == {"small": "snapshots/0c1d/Small.GGUF", "mid": "snapshots/0c1d/mid.Gguf", "3b9f": "blobs/3b9f"}
    assert "there is no such file" in str(init(tmp_path / "gone.gguf", "--out", blobs, ok=False).exception)
