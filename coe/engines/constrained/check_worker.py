"""A process that checks grammars before this one's parent compiles them: `python check_worker.py MEMORY_BYTES`.

A schema of 100 bytes can ask for any amount of time and memory (`"minItems": 1000000000`), in compiled code that no
thread can stop. A process can be stopped.

Requests and replies are JSON in lines, in turn: {"grammar", "cpu_s"} -> {"problems": [...]}, empty if the grammar can
be compiled. A process that exceeds its CPU time or memory ends without a reply.
"""

from __future__ import annotations

import json
import resource
import signal
import sys

from llguidance import LLMatcher, LLParserLimits


def main(memory_bytes: int) -> None:
    """Reply to requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whatever the parent made of it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    limits = LLParserLimits(verbose_errors=False)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])  # SIGPROF ends the process
        _, problems = LLMatcher.validate_grammar_with_warnings(request["grammar"], limits=limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps({"problems": [problem[:2000] for problem in problems[:8]]}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
