"""Ask experts from Python: the whole system in one process, without a server.

python examples/01_ask.py                                  # scripted experts, nothing to download
python examples/01_ask.py examples/zoo/config.yaml         # the zoo's real models, after `make demo`
"""

import asyncio
import sys
from pathlib import Path

from coe import GenerateRequest, Message, open_local

CONFIG = Path(__file__).parent / "tiny" / "service.yaml"


async def main(config: Path) -> None:
    async with open_local(config) as system:
        # The whole answer. "auto" is the default policy; "coe/<policy>" and the name of an expert address others.
        print(await system.ask("What is the capital of France?", model="auto"))

        # The same as it streams, with the decision: which experts were chosen, and why.
        request = GenerateRequest(messages=(Message("user", "What is the capital of Japan?"),), max_tokens=64)
        reply = system.answer(request)
        print(f"policy {reply.policy} chose {', '.join(reply.decision.experts)}: {reply.decision.reason}")
        async for chunk in reply.chunks:
            print(chunk.text, end="", flush=True)
        print()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]) if len(sys.argv) > 1 else CONFIG))
