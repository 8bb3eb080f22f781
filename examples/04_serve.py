"""Start the service, ask it with the official OpenAI client, and stop it.

python examples/04_serve.py                                # scripted experts, nothing to download
python examples/04_serve.py examples/zoo/config.yaml       # the zoo's real models, after `make demo`
"""

import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

from openai import OpenAI

CONFIG = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "tiny" / "service.yaml")
PORT = sys.argv[2] if len(sys.argv) > 2 else "8123"


def wait_until_ready(server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).close()
            return
        except OSError:  # nothing listens yet, or not every process is up
            time.sleep(0.5)
    sys.exit("the service did not start")


coe = Path(sys.executable).with_name("coe")  # or just "coe", in an activated environment
server = subprocess.Popen([coe, "serve", "--config", CONFIG, "--port", PORT])
try:
    wait_until_ready(server)
    client = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none")
    print("models:", ", ".join(model.id for model in client.models.list()))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(model="auto", messages=messages)
    print(f"{answer.model}: {answer.choices[0].message.content}")
finally:
    server.terminate()  # requests in flight are answered first
    server.wait(60)
