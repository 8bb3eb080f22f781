"""A small OpenAI-compatible server, as the command of an expert: `python small_server.py PORT [--option value]...`.

--start-s S: seconds until it listens. --crash-at WORD: it ends itself in the middle of an answer to a prompt with that
word. --mib N: memory that it takes. --listen PORT: another port than it was given. --no-health: it has no /health.
--ignore-sigterm, --child: it starts a child process in its group.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser()
parser.add_argument("port", type=int)
parser.add_argument("--start-s", type=float, default=0.0)
parser.add_argument("--crash-at")
parser.add_argument("--mib", type=int, default=0)
parser.add_argument("--listen", type=int)
parser.add_argument("--no-health", action="store_true")
parser.add_argument("--ignore-sigterm", action="store_true")
parser.add_argument("--child", action="store_true")
parser.add_argument("--exit", type=int)
parser.add_argument("--model")
parser.add_argument("--chatty", type=int, default=0)
options = parser.parse_args()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health" and not options.no_health:
            self.whole(200, {"status": "ok"})
        elif self.path == "/v1/models":
            self.whole(200, {"object": "list", "data": []})
        else:
            self.whole(404, {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = f"{body['model']} says: {body['messages'][-1]['content']}"
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for word in text.split():
            if word == options.crash_at:
                os._exit(3)
            self.event({"delta": {"content": f"{word} "}, "index": 0, "finish_reason": None})
        self.event({"delta": {}, "index": 0, "finish_reason": "stop"})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, choice: dict[str, Any]) -> None:
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()

    def whole(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    print(f"pid {os.getpid()} in {Path.cwd()}, token {os.environ.get('TOKEN')}", flush=True)
    for number in range(options.chatty):
        print(f"{number} {'x' * 1000}", flush=True)
    if options.exit is not None:
        print("model.bin: no such tensor", file=sys.stderr, flush=True)
        sys.exit(options.exit)
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.child:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"child {child.pid}", flush=True)
    held = bytearray(os.urandom(2**20) * options.mib)
    time.sleep(options.start_s)
    ThreadingHTTPServer(
        ("127.0.0.1", options.port if options.listen is None else options.listen), Handler
    ).serve_forever()
