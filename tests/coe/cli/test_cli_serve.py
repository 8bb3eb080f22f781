"""`coe serve`: mistakes are reported before anything starts, and Ctrl-C ends it at any moment.

Ctrl-C under load is the last test of tests/coe/serve/test_serve_ray.py, and SIGTERM under load that of
tests/coe/serve/test_serve_gpus_ray.py: each has a running service.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serve_process import CONTROLLER, READY_S, STOP_S, starting, until

from coe.cli import app, entry, interrupts
from coe.cli.app import main
from coe.serve.cluster.catalog import Catalog
from coe.serve.cluster.source import Source
from registry.keys import KeySpec
from registry.store import Registry

EXPERTS = """
experts:
  - {name: loud, kind: model, source: "fake://upper"}
  - {name: calm, kind: model, source: "fake://echo"}
"""
REPLICA = "ray::ServeReplica"
CONFIG = "experts: [experts.yaml]\nhost: {budget: 1GiB}\npolicies: {default: {expert: loud}}\n"


@dataclass
class Ended:
    status: int
    screen: str


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ended]]:
    """The command as the shell starts it, in this process, on these files; it must end before Ray starts."""
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray starts"))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restored at the end
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(config: str, *arguments: str, experts: str = EXPERTS) -> Ended:
        (tmp_path / "experts.yaml").write_text(experts)
        (tmp_path / "service.yaml").write_text(config)
        monkeypatch.setattr(sys, "argv", ["coe", "serve", "--config", str(tmp_path / "service.yaml"), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert captured.out == "" and "Traceback" not in captured.err
        return Ended(int(ended.value.code or 0), captured.err)

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("sreve: {port: 1}\n", "service.yaml:4: sreve"),
        ("serve: {prot: 1}\n", "service.yaml:4: serve.prot"),
        ("serve: {port: 70000}\n", "serve.port"),
        ("serve: {pools: []}\n", "there must be one"),
        ("serve: {pools: [{experts: [laud]}]}\n", "serve.pools 'hosts': 'laud' is not in the registry; did you mean"),
        ("default_policy: missing\n", "default_policy 'missing' is not among the policies ['default']"),
    ],
)
def test_a_configuration_that_is_wrong_is_refused_with_its_place(
    run: Callable[..., Ended], config: str, message: str
) -> None:
    ended = run(CONFIG + config)
    assert ended.status == 1 and ended.screen.startswith("error: ") and message in ended.screen


def test_traces_that_cannot_be_exported_are_refused_with_what_to_install(
    run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = run(CONFIG + "serve: {trace_endpoint: 'collector:4318'}\n")
    assert ended.status == 1 and "service.yaml:4: serve.trace_endpoint" in ended.screen
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    ended = run(CONFIG)
    assert ended.status == 1 and "the environment asks for 'grpc'" in ended.screen
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL")
    monkeypatch.setattr("coe.telemetry.export._is_installed", lambda: False)
    ended = run(CONFIG)
    assert ended.status == 1 and "pip install 'composition-of-experts[trace]'" in ended.screen


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("{expert: luod}", "'luod' is not in the registry; did you mean 'loud'?"),
        ("{expert: loud, fallback: clam}", "'clam' is not in the registry; did you mean 'calm'?"),
        ("{router: trained}", "trained"),
    ],
)
def test_a_policy_that_cannot_answer_is_refused(run: Callable[..., Ended], policy: str, message: str) -> None:
    ended = run(CONFIG.replace("{expert: loud}", policy))
    assert ended.status == 1 and ended.screen.startswith("error: ") and message in ended.screen


def test_a_service_without_experts_is_refused(run: Callable[..., Ended]) -> None:
    ended = run("policies: {}\n")
    assert ended.status == 1 and "no expert is registered" in ended.screen and "coe registry apply" in ended.screen


def test_a_configuration_that_is_not_there_is_named(run: Callable[..., Ended], tmp_path: Path) -> None:
    ended = run(CONFIG, "--config", str(tmp_path / "nope.yaml"))
    assert ended.status == 1 and "nope.yaml" in ended.screen and "no such file" in ended.screen


def test_a_port_that_is_taken_is_said_before_anything_starts(run: Callable[..., Ended]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = run(CONFIG, "--port", str(port))
    assert ended.status == 1 and f"127.0.0.1:{port} cannot be listened on" in ended.screen
    assert "Address already in use" in ended.screen and "--port" in ended.screen


REFUSED = "is not a loopback address, and there is no API key"


@pytest.mark.parametrize(
    ("host", "warned"), [("0.0.0.0", 1), ("127.0.0.1", 0), ("127.9.9.9", 0), ("localhost", 0), ("203.0.113.7", 1)]
)
def test_an_address_that_others_reach_needs_a_key_or_a_word(run: Callable[..., Ended], host: str, warned: int) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        listen = ("--host", host, "--port", str(other.getsockname()[1]))
        ended = run(CONFIG, *listen)
        assert ended.status == 1 and (f"{host} {REFUSED}" in " ".join(ended.screen.split())) is bool(warned)
        assert ("cannot be listened on" in ended.screen) is not bool(warned)
        if not warned:
            return
        told = run(CONFIG, *listen, "--insecure")
        assert told.screen.count("warning") == 1 and "can use every expert" in told.screen
        with Registry() as registry:
            registry.create_api_key(KeySpec(name="ada"), time.time())
        keyed = run(CONFIG, *listen)
    for ended in (told, keyed):
        assert REFUSED not in ended.screen and "cannot be listened on" in ended.screen
    assert "warning" not in keyed.screen


def test_an_address_that_is_not_of_this_machine_is_said_too(run: Callable[..., Ended]) -> None:
    ended = run(CONFIG, "--host", "203.0.113.7", "--insecure")
    assert ended.status == 1 and "203.0.113.7:8000 cannot be listened on" in ended.screen
    ended = run(CONFIG, "--host", "no.such.host.invalid", "--insecure")
    assert ended.status == 1 and "'no.such.host.invalid' cannot be listened on (" in ended.screen
    assert "set `serve.host`, or `--host`, to an address of this machine" in ended.screen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_finalizer_loses_ends_it_before_anything_starts(
    run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    read = Source.read

    class Lost:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)

    def losing(*arguments: Any) -> Catalog:
        Lost()  # Python ignores and prints what a finalizer raises
        time.sleep(10)  # until it is sent again
        return read(*arguments)

    monkeypatch.setattr(Source, "read", losing)
    ended = run(CONFIG)
    assert ended.status == 0 and ended.screen == "stopped\n"


def test_ctrl_c_during_the_imports_of_the_command_ends_it_after_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Importing:
        """Stands for the package while its modules are imported."""

        interrupts = interrupts

        @property
        def app(self) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return app

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setitem(sys.modules, "coe.cli", Importing())  # type: ignore[arg-type]
    monkeypatch.setattr(app, "main", lambda: pytest.fail("the command runs"))
    monkeypatch.setattr(interrupts._seen, "sigterm", False)  # as in a new process
    try:
        with pytest.raises(SystemExit) as ended:
            entry.main()
        assert ended.value.code == 130 and capsys.readouterr().err.strip() == "interrupted"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("after_s", [1.0, 2.0])
def test_ctrl_c_while_it_reads_ends_at_once(tmp_path: Path, after_s: float) -> None:
    with starting(tmp_path, CONFIG, EXPERTS) as service:
        time.sleep(after_s)
        service.ctrl_c()
        assert service.ended(2 * STOP_S) in (0, 130, -signal.SIGINT)
        assert "ready" not in service.screen and "Traceback" not in service.screen


@pytest.mark.integration
@pytest.mark.parametrize("title", ["/gcs_server", pytest.param(CONTROLLER, marks=pytest.mark.slow), REPLICA])
def test_ctrl_c_while_ray_or_the_replicas_start_ends_in_time(tmp_path: Path, title: str) -> None:
    with starting(tmp_path, CONFIG, EXPERTS) as service:
        until(lambda: service.parts(title) or service.process.poll() is not None, READY_S)
        assert service.process.poll() is None, service.screen
        service.ctrl_c()
        assert service.ended() == 0
        assert service.screen.rstrip().endswith("stopped") and "Traceback" not in service.screen
