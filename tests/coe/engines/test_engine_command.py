"""Servers that an expert's command starts: on demand, under the budget, ended with their host, started again."""

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from coe.engines.command.engine import CommandEngine
from coe.engines.command.expert import CommandExpert
from coe.engines.command.guard import BoundedLog
from coe.engines.supervision.core import EngineLost
from coe.errors import BudgetExceeded, HostLost, WeightsError
from coe.experts import locate
from coe.host import Host
from coe.serve.cluster.file_watch import FileWatch
from coe.types import GenerateRequest
from registry.command_files import check_command
from registry.describe import describe
from registry.documents import parse_document
from registry.errors import DigestMismatch, InvalidSpec
from registry.reconcile import apply, plan
from registry.spec import ExpertSpec
from registry.store import Registry, Snapshot
from routers.base import Message

MIB = 2**20
SERVER = Path(__file__).parents[2] / "support" / "small_server.py"
ENVIRON = {"PATH": os.environ["PATH"], "TOKEN": "of-the-service"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def spec(
    name: str, *arguments: str, folder: Path = Path("/"), size: int | None = 64 * MIB, **source: Any
) -> ExpertSpec:
    command = [sys.executable, str(SERVER), "{port}", *arguments]
    source = {"command": command, "folder": str(folder), "stop_timeout_s": 5, "start_timeout_s": 60, **source}
    fields = {"name": name, "kind": "remote", "context_length": 100, "size_bytes": size, "source": source}
    return describe(ExpertSpec.model_validate(fields))


@asynccontextmanager
async def hosting(*specs: ExpertSpec, budget: int = 256 * MIB, **options: Any) -> AsyncIterator[Host]:
    engine = CommandEngine(environ=ENVIRON, **options)
    snapshot = Snapshot(1, {each.name: each for each in specs})
    host = Host(snapshot, {"command": engine}, budget_bytes=budget, locate=locate)
    try:
        yield host
    finally:
        await host.aclose()


async def ask(host: Host, name: str, text: str = "one two") -> str:
    request = GenerateRequest(messages=(Message("user", text),), max_tokens=20)
    return "".join([chunk.text async for chunk in host.ask(name, request)])


def running(host: Host, name: str) -> Any:
    expert = host.cache.peek(name)
    assert isinstance(expert, CommandExpert) and expert._core.engine is not None
    return expert._core.engine.server


def processes(host: Host, name: str) -> list[psutil.Process]:
    """The guard, the server, and what it has started."""
    guard = psutil.Process(running(host, name)._process.pid)
    return [guard, *guard.children(recursive=True)]


@pytest.fixture
def others() -> set[psutil.Process]:
    """Processes that other tests of this process have left running, such as renderers of templates."""
    return set(psutil.Process().children(recursive=True))


def started_beside(others: set[psutil.Process]) -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True)) - others


def alive(found: list[psutil.Process]) -> list[psutil.Process]:
    _, left = psutil.wait_procs(found, timeout=20)
    return [each for each in left if each.status() != psutil.STATUS_ZOMBIE]


async def test_a_server_starts_at_the_first_request_streams_and_ends_with_the_host() -> None:
    async with hosting(spec("small", "--child", capacity=3)) as host:
        assert not host.resident and host.load_s()["small"] > 0
        request = GenerateRequest(messages=(Message("user", "one two"),))
        chunks = [chunk.text async for chunk in host.ask("small", request)]
        assert "".join(chunks) == "small says: one two " and len(chunks) > 3, "it came in pieces"
        assert host.capacity("small") == 3 and host.unhealthy() == {}
        started = processes(host, "small")
        assert (
            len(started) == 3 and f"127.0.0.1:{running(host, 'small').url.split(':')[2]}" in running(host, "small").url
        )
        assert await asyncio.gather(*(ask(host, "small", f"{i} x") for i in range(8))) == [
            f"small says: {i} x " for i in range(8)
        ]
        assert processes(host, "small") == started, "one server for all requests"
    assert not alive(started), "its children are gone, too"


async def test_servers_share_the_budget_and_are_stopped_for_each_other() -> None:
    a, b, big = spec("a"), spec("b"), spec("big", size=300 * MIB)
    async with hosting(a, b, big, budget=100 * MIB) as host:
        assert await ask(host, "a") == "a says: one two "
        first = processes(host, "a")
        assert await ask(host, "b") == "b says: one two "
        assert host.resident == {"b"} and not alive(first)
        with pytest.raises(BudgetExceeded, match="'big' need 300 MiB, the budget is 100 MiB"):
            await ask(host, "big")
        assert await host.unload("b") == ("b",) and host.cache.used_bytes == 0


async def test_memory_counts_as_stated_until_it_is_measured_and_is_remembered() -> None:
    large = spec("large", "--mib", "150", size=10 * MIB)
    async with hosting(large) as host:
        assert host.footprint("large") == 10 * MIB
        await ask(host, "large")
        host.unload_idle()
        [weights] = host.in_memory()
        assert 150 * MIB < weights.size_bytes < 300 * MIB
    async with hosting(large, spec("fixed", "--mib", "150", size=10 * MIB, measure=False)) as host:
        assert host.footprint("large") > 150 * MIB, "known before it is loaded again"
        await ask(host, "fixed")
        host.unload_idle()
        assert host.cache.used_bytes == host.footprint("fixed") == 10 * MIB


async def test_a_server_that_dies_fails_its_request_and_starts_again_at_the_next() -> None:
    async with hosting(spec("frail", "--crash-at", "boom")) as host:
        assert await ask(host, "frail") == "frail says: one two "
        first = running(host, "frail")
        with pytest.raises(
            HostLost, match=r"the server of 'frail' ended with exit status 3; its last output \(.*log\)"
        ):
            await ask(host, "frail", "boom")
        assert "died" in host.unhealthy()["frail"] and host.load_s()["frail"] > 0
        assert await ask(host, "frail", "fine") == "frail says: fine "
        assert host.unhealthy() == {} and running(host, "frail") is not first


async def test_a_server_that_dies_between_requests_is_noticed_and_started_again() -> None:
    async with hosting(spec("frail")) as host:
        await ask(host, "frail")
        guard, server = processes(host, "frail")
        server.kill()
        assert not alive([guard, server])
        assert "has ended" in host.unhealthy()["frail"]
        assert await ask(host, "frail") == "frail says: one two "


async def test_a_request_before_whose_first_text_the_server_died_may_be_retried_elsewhere() -> None:
    async with hosting(spec("frail", "--crash-at", "frail")) as host:
        with pytest.raises(EngineLost) as caught:
            await ask(host, "frail")
        assert caught.value.retryable and caught.value.client_text == (
            "the server of 'frail' died while it answered; retry the request"
        )


async def test_a_server_that_hangs_is_killed_and_started_again() -> None:
    async with hosting(spec("stuck"), hang_timeout_s=3) as host:
        await ask(host, "stuck")
        first, (guard, server) = running(host, "stuck"), processes(host, "stuck")
        server.suspend()
        expert = host.cache.peek("stuck")
        assert isinstance(expert, CommandExpert)
        expert._watch.stop()  # this test is the only one that looks
        await expert._watch.step()
        assert not alive([guard, server]) and running(host, "stuck") is not first
        assert await ask(host, "stuck") == "stuck says: one two "


async def test_a_slow_start_is_waited_for_and_health_is_read_where_the_server_has_it() -> None:
    async with hosting(spec("slow", "--start-s", "1.5", "--no-health")) as host:
        assert await ask(host, "slow") == "slow says: one two "


async def test_a_server_that_does_not_start_says_why_and_leaves_nothing(
    caplog: pytest.LogCaptureFixture, others: set[psutil.Process]
) -> None:
    caplog.set_level(logging.INFO)
    broken = spec("broken", "--exit", "7", env={"TOKEN": "a-very-secret-value", "N": "1"})
    async with hosting(broken) as host:
        with pytest.raises(WeightsError) as caught:
            await ask(host, "broken")
        text = str(caught.value)
        assert "ended with exit status 7" in text and "model.bin: no such tensor" in text and "broken" in text
        assert "a-very-secret-value" not in text + caplog.text and "token ***" in text
        assert caught.value.client_text == "expert 'broken' cannot be loaded: no server starts"
        assert not host.resident and host.cache.used_bytes == 0
    assert not started_beside(others)


async def test_a_server_on_the_wrong_port_is_not_waited_for_without_end(others: set[psutil.Process]) -> None:
    astray = spec("astray", "--listen", "0", start_timeout_s=1.5)
    async with hosting(astray) as host:
        with pytest.raises(
            WeightsError, match=r"not ready after 1.5 s \(`start_timeout_s`\): http://127.0.0.1:\d+/health"
        ):
            await ask(host, "astray")
    assert not started_beside(others)


async def test_a_load_that_is_cancelled_leaves_no_process(others: set[psutil.Process]) -> None:
    async with hosting(spec("slow", "--start-s", "60")) as host:
        loading = asyncio.create_task(ask(host, "slow"))
        async with asyncio.timeout(30):
            while len(started_beside(others)) < 2:  # it has no event  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
    assert not started_beside(others)


async def test_a_server_that_ignores_sigterm_is_killed() -> None:
    async with hosting(spec("stubborn", "--ignore-sigterm", stop_timeout_s=0.5)) as host:
        await ask(host, "stubborn")
        started = processes(host, "stubborn")
    assert not alive(started)


async def test_a_missing_program_or_folder_is_named() -> None:
    lost = spec("lost", command=["no-such-program", "{port}"])
    gone = spec("gone").model_copy(update={"server": spec("gone").server.model_copy(update={"folder": "/nowhere"})})  # type: ignore[union-attr]
    async with hosting(lost, gone) as host:
        with pytest.raises(WeightsError, match="'no-such-program' is not in the PATH of the service: install it"):
            await ask(host, "lost")
        with pytest.raises(WeightsError, match="runs in /nowhere, which is no folder on this machine"):
            await ask(host, "gone")


@pytest.mark.skipif(sys.platform != "linux", reason="only the kernel of Linux ends a process with its parent")
async def test_the_server_ends_with_a_guard_that_is_killed() -> None:
    async with hosting(spec("small", "--ignore-sigterm")) as host:
        await ask(host, "small")
        guard, server = processes(host, "small")
        guard.kill()
        assert not alive([guard, server])
        assert await ask(host, "small") == "small says: one two "


def test_the_server_ends_with_a_host_that_is_killed(tmp_path: Path) -> None:
    """kill -9, after which no code of the host runs."""
    program = f"""
import asyncio, sys
sys.path[:0] = {[str(Path(__file__).parent), str(SERVER.parent)]!r}
import test_engine_command as tests
async def main():
    async with tests.hosting(tests.spec("small", "--child", "--ignore-sigterm", stop_timeout_s=0.5)) as host:
        await tests.ask(host, "small")
        print(*(each.pid for each in tests.processes(host, "small")), flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
    environment = {**os.environ, "COE_HOME": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment, text=True) as host:
        assert host.stdout is not None
        guard, server, child = (psutil.Process(int(pid)) for pid in host.stdout.readline().split())
        try:
            host.kill()
            assert not alive([guard, server, child]), "SIGTERM, which the server ignores, then SIGKILL"
        finally:
            host.kill()


def test_a_log_is_bounded_and_a_disk_that_refuses_it_does_not_matter(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "a.log", 100)
    for number in range(50):
        log.write(f"line {number:02}\n".encode())
    sizes = [(tmp_path / name).stat().st_size for name in ("a.log", "a.log.1")]
    assert max(sizes) <= 100 and (tmp_path / "a.log").read_text().endswith("line 49\n")
    log.close()
    BoundedLog(tmp_path / "no" / "such" / "folder.log", 100).write(b"lost")


async def test_a_chatty_server_is_not_stopped_by_its_log() -> None:
    async with hosting(spec("chatty", "--chatty", "10000")) as host:
        assert await ask(host, "chatty") == "chatty says: one two "
        log = running(host, "chatty").log
        sizes = [path.stat().st_size for path in log.parent.iterdir()]
        assert len(sizes) == 2 and max(sizes) <= 4 * MIB


def test_the_identity_is_that_of_the_command_and_of_the_files_it_names(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"weights")
    one = spec("a", "--model", "m.gguf", folder=tmp_path, size=None)
    assert one.size_bytes == SERVER.stat().st_size + 7, "an estimate from the files, without the program"
    assert {record.name for record in one.files} == {sys.executable, str(SERVER), "m.gguf"}
    assert check_command(one) == tmp_path
    assert one.digest == spec("a", "--model", "m.gguf", folder=tmp_path, capacity=2).digest
    assert one.digest != spec("b", "--model", "m.gguf", folder=tmp_path).digest, (
        "its model at the server is another one"
    )
    (tmp_path / "m.gguf").write_bytes(b"others!")
    with pytest.raises(DigestMismatch, match="m.gguf differs.*`files`"):
        check_command(one)
    two = spec("a", "--model", "m.gguf", folder=tmp_path)
    assert two.digest != one.digest
    assert spec("a", "--model", "m.gguf", "--mib", "1", folder=tmp_path).digest != two.digest
    assert spec("a", "--model", "m.gguf", folder=tmp_path, env={"A": "1"}).digest != two.digest
    only = spec("a", "--model=m.gguf", folder=tmp_path, files=["m.gguf"])
    assert [record.name for record in only.files] == ["m.gguf"]


def test_an_experts_file_states_a_command_and_its_problems_have_lines(tmp_path: Path) -> None:
    text = """
experts:
  - name: coder
    kind: remote
    context_length: 100
    source:
      command: [llama-server, -m, models/coder.gguf, --port, "{port}"]
      start_timeout_s: 60
"""
    path = tmp_path / "experts.yaml"
    with Registry("sqlite://") as registry:
        [coder] = apply(plan(parse_document(text, path), registry), registry)
        assert coder.source == "command://llama-server" and coder.server is not None
        assert coder.server.folder == str(tmp_path) and registry.get("coder") == coder
        assert plan(parse_document(text, path), registry).steps[0].action == "unchanged"
        for wrong, message in (
            (text.replace('"{port}"', "8080"), r"experts.yaml:7: .*source.command.*valid string"),
            (text.replace('"{port}"', '"8080"'), r"experts.yaml:6: .*does not say where \{port\} goes"),
            (text.replace("start_timeout_s", "timeout"), r"experts.yaml:8: .*timeout.*not a known field"),
            (text.replace("kind: remote", "kind: model"), r"is of kind 'remote'"),
        ):
            with pytest.raises(InvalidSpec, match=message):
                plan(parse_document(wrong, path), registry)


def test_changed_files_of_a_command_are_reported_while_serving(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"weights")
    one, watch = spec("a", "--model", "m.gguf", folder=tmp_path), FileWatch()
    watch.look([one])
    assert watch.problems([]) == []
    (tmp_path / "m.gguf").unlink()
    watch.look([one])
    [problem] = watch.problems([])
    assert "m.gguf is missing" in problem


def test_nothing_of_a_command_is_in_messages_that_clients_read() -> None:
    secret = spec("a", env={"TOKEN": "a-very-secret-value"})
    assert "a-very-secret-value" not in repr(secret) and "small_server" not in secret.source
