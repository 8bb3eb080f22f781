"""`/v1/files` with the official client and with hostile forms, and who sees which file."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import openai
import pytest
from api_server import Gateway, connected, gateway
from batch_runs import openai_row
from batch_service import batching, create, ended, lines, read, upload

from coe.config import BatchesConfig
from coe.serve.batches.claims import Claims
from coe.serve.batches.files import FileStore
from coe.serve.http.keyring import Keyring, StoredKeys
from coe.serve.http.ledger import Ledger
from registry.keys import KeySpec, Limit
from registry.store import Registry

ROW = lines(openai_row("a", "hello", "echo"))


def made_key(url: str, name: str, **fields: object) -> str:
    """A new key's text."""
    with Registry(url) as registry:
        return registry.create_api_key(KeySpec.model_validate({"name": name, **fields}), time.time())[1]


def form(*parts: tuple[str, str, bytes], boundary: str = "x") -> bytes:
    """A form of parts: name, further parameters, content."""
    body = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"
        for name, more, content in parts
    )
    return body + f"--{boundary}--\r\n".encode()


FILE = ("file", '; filename="in.jsonl"', ROW)
PURPOSE = ("purpose", "", b"batch")


async def post(there: Gateway, body: bytes, content_type: str = "multipart/form-data; boundary=x") -> tuple[int, str]:
    answer = await there.http.post("/v1/files", content=body, headers={"content-type": content_type})
    return answer.status_code, answer.text


async def test_a_file_is_kept_listed_read_and_deleted(tmp_path: Path) -> None:
    content = b"\x00\r\n--x\r\n" + bytes(range(256)) * 4000
    async with batching(tmp_path) as there:
        files = there.client.files
        made = await files.create(
            file=("näme.jsonl", content), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert (made.bytes, made.filename, made.purpose, made.object) == (len(content), "näme.jsonl", "batch", "file")
        assert made.expires_at == made.created_at + 3600
        assert await files.retrieve(made.id) == made
        answer = await files.content(made.id)
        assert answer.content == content and answer.response.headers["content-disposition"].startswith("attachment")
        assert (await files.delete(made.id)).deleted
        for call in (files.retrieve, files.content, files.delete):
            with pytest.raises(openai.NotFoundError):
                await call(made.id)
        assert list((tmp_path / "files").iterdir()) == []


async def test_lists_have_pages(tmp_path: Path) -> None:
    async with batching(tmp_path) as there:
        made = [await upload(there, ROW, f"{i}.jsonl") for i in range(5)]
        page = await there.client.files.list(limit=2, order="asc")
        assert len(page.data) == 2 and page.has_more
        assert {each.id async for each in there.client.files.list(limit=2)} == set(made)
        down = [each.id async for each in there.client.files.list(limit=2, order="desc")]
        assert down == [each.id async for each in there.client.files.list(order="asc")][::-1]
        assert (await there.client.files.list(purpose="batch_output")).data == []
        for wrong in ({"limit": 0}, {"limit": 10**30}, {"after": "file-nothing"}, {"extra_query": {"order": "up"}}):
            with pytest.raises(openai.BadRequestError):
                await there.client.files.list(**wrong)  # type: ignore[arg-type]


async def test_without_the_setting_the_endpoints_say_what_to_set() -> None:
    async with gateway() as there:
        for call in (there.client.files.list(), there.client.batches.list()):
            with pytest.raises(openai.APIStatusError, match=r"serve\.batches\.folder") as error:
                await call
            assert error.value.status_code == 501


async def test_a_form_in_any_order_is_read(tmp_path: Path) -> None:
    async with batching(tmp_path) as there:
        assert (await post(there, form(FILE, PURPOSE)))[0] == 200


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the parser, for headers that it cannot read
@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        (b"{}", "application/json", (415, "multipart/form-data")),
        (b"{}", "multipart/form-data", (400, "not a whole")),
        (b"", "multipart/form-data; boundary=x", (400, "not a whole")),
        (form(FILE, PURPOSE)[:-30], "multipart/form-data; boundary=x", (400, "each with a name")),
        (form(FILE, PURPOSE)[:-12], "multipart/form-data; boundary=x", (400, "not a whole")),
        (form(PURPOSE), "multipart/form-data; boundary=x", (400, "no file")),
        (form(FILE), "multipart/form-data; boundary=x", (400, "purpose")),
        (form(FILE, ("purpose", "", b"fine-tune")), "multipart/form-data; boundary=x", (400, "purpose")),
        (form(FILE, FILE, PURPOSE), "multipart/form-data; boundary=x", (400, "one file")),
        (form(FILE, PURPOSE, PURPOSE), "multipart/form-data; boundary=x", (400, "twice")),
        (form(FILE, PURPOSE, ("more", "", b"1")), "multipart/form-data; boundary=x", (400, "more")),
        (form(FILE, ("purpose", "", b"b" * 5000)), "multipart/form-data; boundary=x", (400, "more than")),
        (form(*[(f"f{i}", "", b"") for i in range(50)]), "multipart/form-data; boundary=x", (400, "at most")),
        (form(("file", '; filename="a\tb"', ROW), PURPOSE), "multipart/form-data; boundary=x", (400, "printable")),
        (b"--x\r\nA: " + b"a" * 60_000 + b"\r\n\r\n", "multipart/form-data; boundary=x", (400, "not a whole")),
        (b"--x\r\n" + b"A: b\r\n" * 5000 + b"\r\n", "multipart/form-data; boundary=x", (400, "not a whole")),
        (b"--x\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n--y", "multipart/form-data; boundary=x", (400, "")),
        (b"\n" * 100_000, "multipart/form-data; boundary=x", (400, "not a whole")),
    ],
)
async def test_hostile_forms_are_refused_and_leave_nothing(
    tmp_path: Path, body: bytes, content_type: str, expected: tuple[int, str]
) -> None:
    async with batching(tmp_path) as there:
        status, text = await asyncio.wait_for(post(there, body, content_type), 20)
        assert status == expected[0] and expected[1] in text
        assert list((tmp_path / "files").iterdir()) == []


async def test_files_have_bounds_each_and_together(tmp_path: Path) -> None:
    given = {"max_file_bytes": 3000, "max_files_bytes": 5000}
    async with batching(tmp_path, given=given) as there:
        with pytest.raises(openai.APIStatusError, match="max_file_bytes") as error:
            await upload(there, b"x" * 3001)
        assert error.value.status_code == 413
        await upload(there, b"x" * 3000)
        with pytest.raises(openai.APIStatusError, match="max_files_bytes") as error:
            await upload(there, b"x" * 2001)
        assert error.value.status_code == 507
        await upload(there, b"x" * 2000)
        assert sorted(path.suffix for path in (tmp_path / "files").iterdir()) == [".data"] * 2 + [".json"] * 2


async def test_a_slow_upload_ends_and_one_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    head = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    head += b"Content-Length: 9999\r\n\r\n" + form(FILE)[:90]
    async with batching(tmp_path, settings={"body_idle_s": 0.3}) as there:
        async with connected(there.port) as (reader, writer):
            writer.write(head)
            assert b"408" in await asyncio.wait_for(reader.readline(), 20)
        async with connected(there.port) as (_, writer):
            writer.write(head)
        async with asyncio.timeout(20):
            while list((tmp_path / "files").iterdir()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def test_a_large_file_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    write = FileStore.upload

    def watched(store: FileStore):  # type: ignore[no-untyped-def]
        stored = write(store)
        inner = stored.write

        def count(data: bytes) -> None:
            nonlocal most
            most = max(most, len(data))
            inner(data)

        stored.write = count  # type: ignore[method-assign]
        return stored

    monkeypatch.setattr(FileStore, "upload", watched)
    async with batching(tmp_path) as there:
        file_id = await upload(there, b"0123456789abcdef" * 2**19)
        assert (await there.client.files.retrieve(file_id)).bytes == 2**23
        assert most <= 2**18


async def test_keys_see_their_own_files_and_batches_only(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/keys.db"
    ada, bob = made_key(url, "ada"), made_key(url, "bob", experts=["upper"])
    async with batching(tmp_path / "batches", keyring=Keyring(StoredKeys(url))) as there:
        with pytest.raises(openai.AuthenticationError):
            await there.client.files.list()
        async with there.client.with_options(api_key=ada) as hers, there.client.with_options(api_key=bob) as his:
            made = await hers.files.create(file=("a.jsonl", ROW), purpose="batch")
            batch = await hers.batches.create(
                input_file_id=made.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
            asked = [his.files.retrieve, his.files.content, his.files.delete]
            for call in asked:
                with pytest.raises(openai.NotFoundError):
                    await call(made.id)
            for ask in (his.batches.retrieve, his.batches.cancel):
                with pytest.raises(openai.NotFoundError):
                    await ask(batch.id)
            with pytest.raises(openai.NotFoundError):
                await his.batches.create(
                    input_file_id=made.id, endpoint="/v1/chat/completions", completion_window="24h"
                )
            assert (await his.files.list()).data == [] and (await his.batches.list()).data == []


async def test_the_rights_and_limits_of_a_key_hold_in_its_batches(tmp_path: Path) -> None:
    """An expert that it may not use is unknown, also in errors; what it uses is charged; a limit fails the rest."""
    url = f"sqlite:///{tmp_path}/keys.db"
    limits = [Limit(what="requests", per="day", most=2)]
    text = made_key(url, "bob", experts=["upper"], limits=limits)
    content = lines(
        openai_row("hidden", "x", "echo"), *(openai_row(f"r{i}", "hello", "upper", max_tokens=5) for i in range(4))
    )
    ledger = Ledger(lambda: Registry(url))
    keyring = Keyring(StoredKeys(url))
    async with batching(tmp_path / "batches", keyring=keyring, ledger=ledger) as there:
        there.client.api_key = text
        batch = await ended(there, (await create(there, await upload(there, content))).id)
        assert batch.request_counts is not None and batch.request_counts.completed == 2
        bad = await read(there, batch.error_file_id)
        hidden = bad.pop("hidden")["response"]
        assert hidden["status_code"] == 404 and "short" not in str(hidden)
        assert {line["response"]["body"]["error"]["code"] for line in bad.values()} == {"rate_limit_exceeded"}
        await ledger.close()


async def test_a_batch_of_a_revoked_key_ends(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/keys.db"
    text = made_key(url, "ada")
    keyring = Keyring(StoredKeys(url))
    content = lines(*(openai_row(f"r{i}", "hello", "echo") for i in range(500)))
    async with batching(tmp_path / "batches", keyring=keyring, token_delay_s=0.3, given={"in_flight": 1}) as there:
        there.client.api_key = text
        made = await create(there, await upload(there, content))
        with Registry(url) as registry:
            registry.revoke_api_key("ada", time.time())
        batches = tmp_path / "batches" / "batches" / made.id / "batch.json"
        async with asyncio.timeout(60):
            while '"status": "failed"' not in batches.read_text():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert "revoked" in batches.read_text()


def test_expired_files_are_deleted_unless_a_batch_reads_them(tmp_path: Path) -> None:
    now = 1e9
    store = FileStore(BatchesConfig(folder=tmp_path, keep_days=1), lambda: now)
    kept, gone = (store.upload().commit(None, name, "batch", None) for name in ("kept", "gone"))
    now += 86_401
    store.sweep(lambda: {kept.id})
    assert store.path(kept.id).exists() and not store.path(gone.id).exists()


def test_a_claim_of_another_machine_holds_while_it_beats(tmp_path: Path) -> None:
    now = 1e9
    claims = Claims(tmp_path, 2, lambda: now)
    folder = tmp_path / "batch"
    folder.mkdir()
    (folder / "claim.json").write_text(f'{{"host": "another", "pid": 1, "at": {now}}}')
    assert claims.take("b", folder) is None
    now += 61
    claim = claims.take("b", folder)
    assert claim is not None and claims.take("b", folder) is None
    claim.release()
    again = claims.take("b", folder)
    assert again is not None
    again.release()
