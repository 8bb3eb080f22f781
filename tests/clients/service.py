"""The service that the clients are tested against: `coe serve` over the scripted endpoint and SmolLM2."""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import uvicorn
import yaml

sys.path.append(str(Path(__file__).parents[1] / "support"))
from scripted_endpoint import MODEL, scripted_app
from scripted_replies import CAPABILITIES, CONTEXT
from serve_process import free_port, serving

LOCAL: Final = "smollm2"
CONFIG: Final = {
    "experts": ["experts.yaml"],
    "engines": {"hf": {"dtype": "float32"}},  # so that scores equal those of another program
    "policies": {"default": {"expert": LOCAL, "fallback": MODEL}},
    "serve": {"pools": [{"pins": [LOCAL]}], "cors_origins": ["https://app.example.com"]},
}
Record = Callable[[str, dict[str, Any]], None]


@contextmanager
def scripted_endpoint(record: Record = lambda path, body: None) -> Iterator[str]:
    """The scripted endpoint in a thread; its base URL. `record` is called with the path and body of each request."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(scripted_app(record), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def service(weights: Path) -> Iterator[str]:
    """`coe serve` with the experts `scripted` and `smollm2`; its base URL.

    Args:
        weights: the folder of SmolLM2.
    """
    with scripted_endpoint() as source, tempfile.TemporaryDirectory() as folder:
        scripted = {"name": MODEL, "kind": "remote", "source": source, "context_length": CONTEXT}
        # Its chat template renders no tools, so the capability is stated: a demanded call is written all the same.
        local = {"name": LOCAL, "kind": "model", "source": str(weights), "capabilities": ["tools"]}
        experts = {"experts": [{**scripted, "capabilities": [*CAPABILITIES]}, local]}
        with serving(Path(folder), yaml.safe_dump(CONFIG), yaml.safe_dump(experts)) as served:
            yield served.base_url
