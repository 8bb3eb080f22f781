"""Logs and warnings of libraries do not reach the terminal; those of this project do, in a line."""

import json
import os
import subprocess
import sys

PROGRAM = """
from coe.cli import logs
logs.quiet_libraries()
import logging, warnings
logging.getLogger("stamina").warning("retrying")
logging.getLogger("httpx").error("HTTP 500")
logging.getLogger("coe.signals").warning("keywords of %s cannot be read", "[sql]")
logging.getLogger("coe.host").info("loaded")
warnings.warn_explicit("old API", UserWarning, "/env/site-packages/torch/x.py", 3)
warnings.warn_explicit("the encoder truncates", UserWarning, "/src/routers/x.py", 3)
"""


def run(program: str = PROGRAM, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    assert done.stdout == ""
    return done.stderr


def test_only_notices_of_this_project_are_shown() -> None:
    assert run().splitlines() == [
        "warning: keywords of [sql] cannot be read",
        "warning: the encoder truncates",
    ]


def test_all_logs_can_be_asked_for() -> None:
    shown = run(COE_LOG="info")
    assert "WARNING stamina: retrying" in shown and "INFO coe.host: loaded" in shown


def test_with_json_every_line_is_an_object() -> None:
    program = PROGRAM.replace("import logging, warnings", "import logging, warnings\nlogs.json_lines()")
    program += """
from coe.cli.serve import _say
_say("ready", "http://127.0.0.1:8000/v1 [for] any client")
"""
    for environment in ({}, {"COE_LOG": "info"}):
        lines = [json.loads(line) for line in run(program, **environment).splitlines()]
        shown = {line["logger"]: (line["level"], line["event"]) for line in lines}
        assert shown["coe.signals"] == ("warning", "keywords of [sql] cannot be read")
        assert shown["coe.host"] == ("info", "loaded")
        assert "the encoder truncates" in shown["py.warnings" if environment else "coe"][1]
        assert shown["coe.serve"] == ("info", "ready: http://127.0.0.1:8000/v1 [for] any client")
        assert lines[-1]["part"] == "ready" and ("stamina" in shown) == bool(environment)
