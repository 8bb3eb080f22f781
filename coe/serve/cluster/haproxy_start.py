"""Starts HAProxy for Ray Serve, with what Ray's configuration lacks. Run as a script, without other imports of `coe`.

    python haproxy_start.py BINARY STATS_PORT METRICS_PORT HEAD_S -db -f CONFIGURATION ...

Ray writes CONFIGURATION before each start and reload. Its template binds statistics and metrics to all interfaces, has
no timeout for a request's head, and splices the bodies of requests: HAProxy 2.8 then does not notice that a client has
left. No setting of Ray changes that. The process ends with the one that started it.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def completed(text: str, *, ports: tuple[str, ...], head_s: str) -> str:
    """A configuration of Ray's with its internal ports on 127.0.0.1, a timeout for heads, and no spliced requests."""
    for port in ports:
        text = re.sub(rf"^(\s*bind )\*?:{port}$", rf"\g<1>127.0.0.1:{port}", text, flags=re.MULTILINE)
    text = re.sub(r"^ *option splice-request\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^defaults$", rf"defaults\n    timeout http-request {head_s}s", text, flags=re.MULTILINE)


def main() -> None:
    """Complete the configuration, and become HAProxy."""
    binary, stats, metrics, head_s, *arguments = sys.argv[1:]
    path = Path(arguments[arguments.index("-f") + 1])
    path.write_text(completed(path.read_text(), ports=(stats, metrics), head_s=head_s))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main()
