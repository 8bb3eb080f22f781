"""Server: deploys a service on Ray, pushes changes to it, and takes it down.

with Server(source, say) as server:      # Ray is up, every deployment is running
    server.watch(stop)                   # pushes changes until `stop` is set
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from coe.config import Config, HostPoolConfig
from coe.errors import CoeError, ConfigError, EngineError
from coe.own_ray import start_ray
from coe.serve.cluster.catalog import serving
from coe.serve.cluster.file_watch import FileWatch
from coe.serve.cluster.gpus import check_gpus, gpus_by_pool, groups_by_pool, with_gpus
from coe.serve.cluster.ingress import Ingress
from coe.serve.cluster.source import Source
from registry.errors import RegistryError
from routers.errors import RouterError

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

Say = Callable[[str, str], None]
"""`(part, message)`: a status line for the terminal."""

NAMESPACE: Final = "coe"
OBJECT_STORE_BYTES: Final = 200 * 2**20
"""Bytes of Ray's object store on this machine; requests and answers are small."""
STOP_S: Final = 8.0
"""Seconds Serve has to stop its replicas in order, which have 5 (`application.GRACE_S`); Ray then kills the rest."""
PROGRESS_S: Final = 10.0
"""Seconds between two status lines while processes start: a pinned expert can take a minute to load."""
RETRY_S: Final = 2.0
MOST_RETRY_S: Final = 300.0
"""Seconds until a change that has not reached every process is pushed again; doubled each time, up to the most."""
ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no usage reports
    "RAY_AUTH_MODE": "token",  # Ray's default; it warns if unset
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # a dead proxy is replaced within seconds
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "3",
    "RAY_SERVE_PROXY_UNHEALTHY_THRESHOLD": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "coe.serve.http.connection.install",  # limits of its connections
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Settings of Ray that exist only as environment variables. Values set by the user take precedence."""
OF_OWN_RAY: Final = {
    # Less CPU per request (docs/results.md): plain gRPC between processes, and one event loop per process instead of
    # three. Loading and generation run in threads, so the loop stays free.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),  # the default of 4 MiB fails on a long prompt
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
"""Settings that must be equal in all processes of a Ray cluster; a cluster keeps those it was started with."""
OF_SERVING_PROCESSES: Final = {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
"""Set after this process has read its own settings: it has no event loop, so its calls to hosts need Serve's."""


class Server:
    """Runs a service for the duration of its `with` block.

    Raises:
        ConfigError: the port is taken, or Ray cannot be reached.
        CoeError: a deployment cannot start; the message is its own.
    """

    def __init__(self, source: Source, say: Say) -> None:
        self._source, self._say = source, say
        self._settings = source.config.serve
        self._ingress = Ingress(self._settings)
        self._ray_begun = False
        self._gpus: dict[str, float] | None = None
        self._groups: dict[str, Mapping[str, Any]] | None = None
        self._files, self._warnings, self._not_reloaded = FileWatch(), list[str](), ""
        self._served = source.catalog  # the last one that has reached every process
        self._retry_at, self._retry_s = math.inf, RETRY_S

    def __enter__(self) -> Self:
        self._ingress.__enter__()
        try:
            self._start_ray()
            self._deploy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._ingress.__exit__()

    def watch(self, stop: threading.Event) -> None:
        """Push a new catalog whenever the registry or a file changes, and report the health of processes and files."""
        health = ""
        while not stop.wait(self._settings.watch_s):
            health = self._tell_health(health)
            try:
                if self._source.changed() or time.monotonic() >= self._retry_at:
                    self._push()
                    self._not_reloaded = ""
            except (CoeError, RegistryError, RouterError, OSError) as error:
                self._report_not_reloaded(str(error))
            self._report_warnings()

    def _report_not_reloaded(self, why: str) -> None:
        """Report a change that is invalid, or is not served yet and will be pushed again; each reason once."""
        again = self._served is not self._source.catalog
        if again:
            self._retry_at = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, MOST_RETRY_S)
        before, self._not_reloaded = self._not_reloaded, f"not reloaded: {why}"
        if not (again and self._not_reloaded == before):
            self._say("not reloaded", f"{why}\n{'It is tried again.' if again else 'The service continues unchanged.'}")

    def _report_warnings(self) -> None:
        """Report what is wrong with inputs and files: each change on the terminal, all of it in `/health`."""
        from coe.serve.cluster import deployed

        files = self._files.problems(self._source.catalog.snapshot.experts.values())
        for problem in files:
            if problem not in self._warnings:
                self._say("files", f"{problem}\nWeights in memory stay as they are; the next load is refused.")
        for problem in self._warnings:
            if problem not in files and not problem.startswith("not reloaded"):
                self._say("files", f"as registered again: {problem}")
        before = self._warnings
        self._warnings = [*([self._not_reloaded] if self._not_reloaded else []), *files]
        if self._warnings or before:  # again in each round: a gateway may have started since
            deployed.show_warnings(self._warnings)

    def _push(self) -> None:
        """Read the files and deploy what they say.

        Raises:
            CoeError, RegistryError, RouterError: they are invalid, and nothing changes; or a process does not have the
                change. Then `_served` is not the catalog of the source, and it is to be pushed again under another
                number: Serve passes none on that its processes have been given.
        """
        catalog, fixed = self._source.reread()
        if self._source.replaced:
            self._say("registry", "another database file is in the place of the one before; it is used from now on")
        started = time.perf_counter()
        self._pass_on(catalog.generation)
        before, self._served = self._served, catalog
        self._retry_at, self._retry_s = math.inf, RETRY_S
        changes = _changes(before.snapshot.experts, catalog.snapshot.experts)
        for what, now, then in (("experts", catalog.pools, before.pools), ("pins", catalog.pins, before.pins)):
            if others := [name for name in now if now[name] != then[name]]:
                changes += f"; other {what} in the pools {', '.join(others)}"
        self._say("reloaded", f"{changes}; policies {', '.join(catalog.policies)}; {_since(started)}")
        if fixed:
            self._say("restart needed", f"the sections {', '.join(fixed)} changed too and take effect at a restart")

    def _pass_on(self, generation: int) -> None:
        """Deploy the current catalog, and wait until every process has it. Raises CoeError."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        from coe.serve.cluster import deployed

        try:
            self._run()
            self._await_running(lambda app: None, "the change has not reached every process")
            behind = deployed.behind(generation)
        except (RayError, RayServeException) as error:
            why = f"{type(error).__name__}: {deployed.gist(str(error))}"
            raise EngineError(f"Ray Serve has not taken the change: {why}") from error
        if behind:
            raise EngineError(f"{behind} gateways failed to load the change and answer as before: see their log")

    def _start_ray(self) -> None:
        own = self._settings.ray is None
        _set_unless_set(ENVIRONMENT | OF_OWN_RAY if own else ENVIRONMENT)
        import logging

        import ray
        from ray import serve
        from ray.serve.config import HTTPOptions

        if own:
            _set_unless_set(OF_SERVING_PROCESSES)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # Ray's terminal output; its log files are complete
        started, self._ray_begun = time.perf_counter(), True
        on_sigterm = signal.getsignal(signal.SIGTERM)
        if own:
            start_ray(
                namespace=NAMESPACE,
                num_cpus=logical_cpus(self._source.config),
                object_store_memory=OBJECT_STORE_BYTES,
            )
        else:
            self._join_ray()
        if threading.current_thread() is threading.main_thread():
            # Ray's core handles SIGTERM itself and would end this process at once with a stack trace.
            signal.signal(signal.SIGTERM, on_sigterm)
        serve.start(
            proxy_location=self._ingress.location,
            http_options=HTTPOptions(host=self._settings.host, port=self._settings.port),
            logging_config={"encoding": self._settings.log_format.upper()},
        )
        logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"  # type: ignore[attr-defined]
        self._say("ray", f"up in {_since(started)}, logs in {logs}")
        for what in self._ingress.listens:
            self._say("listens", what)

    def _join_ray(self) -> None:
        import logging

        import ray

        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            ray.init(address=self._settings.ray, namespace=NAMESPACE, **quiet)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ConfigError(f"Ray cannot be reached ({self._settings.ray}): {error}") from error

    def _deploy(self) -> None:
        from coe.serve.cluster import deployed

        started = said = time.perf_counter()
        told: set[str] = set()

        def tell(app: ApplicationStatusOverview) -> None:
            nonlocal said
            for name, deployment in app.deployments.items():
                if deployment.status == "HEALTHY" and name not in told:
                    told.add(name)
                    self._say(name, f"{deployed.running(deployment)} up in {_since(started)}")
                elif _is_news(deployment.message, told) and name not in told:
                    told.add(deployment.message)
                    self._say(name, deployed.gist(deployment.message))
            if (late := app.deployments.keys() - told) and time.perf_counter() - said > PROGRESS_S:
                said = time.perf_counter()
                self._say("starting", f"{', '.join(sorted(late))}, {_since(started)} so far")

        for pool in self._settings.pools:
            self._say(pool.name, _what_loads(self._source, pool))
        self._run()
        self._await_running(tell)
        for pool in self._settings.pools:
            for state in deployed.states(pool.name):
                if state["failed"]:
                    reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(state["failed"].items()))
                    raise ConfigError(f"the service cannot start: pinned experts of {pool.name} fail: {reasons}")
                if state["loaded_s"]:
                    times = ", ".join(f"{name} in {seconds:.1f} s" for name, seconds in state["loaded_s"].items())
                    self._say(pool.name, f"loaded {times}")

    def _run(self) -> None:
        from ray.serve import RunTarget
        from ray.serve.api import run_many

        from coe.serve.cluster.application import build_application
        from coe.serve.cluster.gateway import APP

        config = self._with_gpus()
        application = build_application(config, self._source.catalog, self._with_groups(config))
        run_many(
            [RunTarget(target=application, name=APP, route_prefix="/")],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )

    def _with_gpus(self) -> Config:
        """The configuration with the GPUs of each pool: chosen once, since another choice restarts processes."""
        import ray

        config = self._source.config
        if self._gpus is None:
            available = float(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
            self._gpus = gpus_by_pool(config, self._source.catalog.snapshot, available)
            if self._settings.ray is None:  # a cluster may get more nodes
                check_gpus(config, self._gpus, available)
        return with_gpus(config, self._gpus)

    def _with_groups(self, config: Config) -> Mapping[str, Mapping[str, Any]]:
        """The placement groups of the hosts of each pool; reports pools whose hosts restart to get one."""
        before = self._groups
        self._groups = groups_by_pool(config, self._source.catalog.snapshot, before)
        if before is not None and (new := [name for name, group in self._groups.items() if group != before[name]]):
            self._say(
                "restarts",
                f"the hosts of the pools {', '.join(new)}: engines that split models over several GPUs need a group of "
                "them",
            )
        return self._groups

    def _await_running(
        self, tell: Callable[[ApplicationStatusOverview], None], otherwise: str = "the service cannot start"
    ) -> None:
        """Poll until every deployment runs, reporting each status. Raises ConfigError with the reason if one fails."""
        from coe.serve.cluster import deployed

        while True:
            app = deployed.status()
            tell(app)
            if app.status == "RUNNING":
                return
            if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                reasons = [deployed.gist(d.message) for d in app.deployments.values() if d.message]
                raise ConfigError(f"{otherwise}: {'; '.join(reasons) or app.message}")
            time.sleep(deployed.POLL_S)

    def _tell_health(self, before: str) -> str:
        """Report when a process is missing, and when all are back."""
        from coe.serve.cluster import deployed

        missing = [
            f"{name}: {deployed.gist(deployment.message) or deployment.status.lower()}"
            for name, deployment in deployed.status().deployments.items()
            if deployment.status == "UNHEALTHY" or not deployed.running(deployment)
        ]
        now = "; ".join(missing)
        if now != before:
            self._say("processes", now or "all up again")
        return now

    def _stop(self) -> None:
        """Stop the service, in order while time remains."""
        if not self._ray_begun:  # Ctrl-C may arrive while Ray is partly imported
            return
        import ray
        from ray import serve

        if not ray.is_initialized():
            return
        from coe.serve.cluster import deployed

        down = serve.shutdown if self._settings.ray is None else deployed.delete
        # Ray reports Serve's regular end as a failure on the terminal.
        with _undisturbed(), Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            in_order = threading.Thread(target=down, daemon=True)
            in_order.start()
            in_order.join(STOP_S)
            ray.shutdown()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore a second Ctrl-C while the processes are being stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _set_unless_set(environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def logical_cpus(config: Config) -> int:
    """Logical CPUs of a Ray instance started here: the most that all processes request, and at least the real count."""
    processes = (config.serve.gateway, *config.serve.pools)
    wanted = sum(process.replicas.max * process.num_cpus for process in processes)
    return max(os.cpu_count() or 1, math.ceil(wanted) + 1)


def _is_news(message: str, told: Collection[str]) -> bool:
    """Whether a message of Serve says more than that a replica takes long: loading weights does."""
    return bool(message) and message not in told and "taken more than" not in message


def _what_loads(source: Source, pool: HostPoolConfig) -> str:
    """Status text: the experts a pool loads before it is ready."""
    served = serving(source.catalog.snapshot, pool)
    pins = source.catalog.pins[pool.name]
    if not pins:
        return f"{len(served)} experts, loaded on their first request"
    return f"loading {', '.join(pins)}; the others of {len(served)} experts load on their first request"


def _changes(before: Any, after: Any) -> str:
    """Status text: experts added, changed and removed."""
    parts = {
        "added": after.keys() - before.keys(),
        "removed": before.keys() - after.keys(),
        "changed": {name for name in before.keys() & after.keys() if before[name] != after[name]},
    }
    return "; ".join(f"{what} {', '.join(sorted(names))}" for what, names in parts.items() if names) or "same experts"


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.1f} s"
