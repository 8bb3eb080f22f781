"""What every test shares: an empty home, one compute thread, no network, and the real small bases."""

import gc
import logging
import os
import signal
from collections.abc import Generator
from pathlib import Path

# Before torch is imported anywhere: threads of several workers on few cores fight each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["COLUMNS"] = "200"  # tables in captured output are not wrapped

import pytest

# Tests of Ctrl-C must not depend on how they are started: background jobs of a shell ignore it, as do their children.
signal.signal(signal.SIGINT, signal.default_int_handler)

REAL_HOME = Path(os.environ.get("COE_HOME") or Path.home() / ".cache" / "coe").expanduser().absolute()
"""Where models are kept between runs: converting a base takes a while, so tests share it with the demo."""


def _fsync(descriptor: int) -> None:
    """Tests need no protection from power loss; a wrong descriptor is still an error."""
    os.fstat(descriptor)


os.fsync = _fsync


@pytest.fixture(autouse=True)
def coe_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has an empty home: registries, caches and routers of the user are neither read nor written."""
    home = tmp_path / "coe-home"
    monkeypatch.setenv("COE_HOME", str(home))
    monkeypatch.delenv("COE_REGISTRY", raising=False)
    return home


@pytest.fixture(autouse=True)
def coe_log_handlers() -> Generator[None]:
    """A host that runs in the tests' process sends the log of its engines to Serve's handlers; later tests do not."""
    logger = logging.getLogger("coe")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture(scope="session")
def zoo_bases() -> Path:
    """The folder of the zoo's base models, fetched and converted on first use, and kept between runs."""
    from examples.zoo.fetch import BASES, fetch

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COE_HOME", str(REAL_HOME))
        folders = [fetch(base) for base in BASES]
    return folders[0].parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers a file is the unit of work; the long ones start first.

    The README's test takes longest, then the files that start processes and real models.
    """
    if not hasattr(config, "workerinput"):  # this process is not a worker of pytest-xdist
        return
    long = {item.path for item in items if item.get_closest_marker("integration")}
    items.sort(key=lambda item: (item.path.name != "test_readme.py", item.path not in long))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Objects of imports live until the end; the garbage collection of an unloaded model need not visit them."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Captured output may hold lone surrogates, which pytest-xdist cannot send from worker to controller."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
