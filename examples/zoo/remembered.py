"""A cache of experts' answers in a file: greedy answers do not change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict
from pathlib import Path

from coe.config import Config
from coe.orchestrator import AskExpert
from coe.types import Chunk, GenerateRequest, Usage
from registry.store import Snapshot


def dtype_of(config: Config) -> str:
    """The type of the weights in the hf engine of a service, such as `torch.float32`; `auto` is resolved here."""
    from coe.engines.hf.load import choose_device, choose_dtype

    settings = config.engines.hf
    return str(choose_dtype(settings.dtype, choose_device(settings.device)))


class Remembered:
    """Wraps a Host's `ask` for an Orchestrator and saves every answer at once.

    An interrupted run resumes, and compositions that make the same call share its answer. Answers come whole, with
    their token counts and without times. Calls for notes, and calls that read notes, are made every time.

    Args:
        snapshot: answers belong to an expert's content: an expert with another digest is called again.
        dtype: of the weights in the engine (`dtype_of`): rounding decides close tokens, so answers belong to it, too.
        file: JSON lines, created if missing.
        report: called after every answer with the number generated so far.
    """

    def __init__(
        self, ask: AskExpert, snapshot: Snapshot, dtype: str, file: Path, report: Callable[[int], None] = lambda _: None
    ) -> None:
        self._ask, self._snapshot, self._dtype, self._file, self._report = ask, snapshot, dtype, file, report
        self._known: dict[str, Chunk] = {}
        self.generated = 0
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            whole = file.read_text(encoding="utf-8").rpartition("\n")[0]  # what was cut off in its last line is lost
            file.write_text(whole + "\n" if whole else "", encoding="utf-8")
            for line in map(json.loads, whole.splitlines()):
                self._known[line["key"]] = Chunk(line["text"], line["finish_reason"], Usage(*line["usage"]))

    async def __call__(self, expert: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """The whole answer as one chunk. Raises what the expert raises; failures are not cached."""
        if request.wants != "text" or request.notes is not None:
            async for chunk in self._ask(expert, request):
                yield chunk
            return
        key = self._key(expert, request)
        if key not in self._known:
            text = ""
            async for chunk in self._ask(expert, request):
                text += chunk.text
            assert chunk.finish_reason is not None and chunk.usage is not None  # by the contract of Expert.generate
            self._known[key] = Chunk(text, chunk.finish_reason, chunk.usage)
            usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
            line = {"key": key, "expert": expert, "text": text, "finish_reason": chunk.finish_reason, "usage": usage}
            with self._file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
            self.generated += 1
            self._report(self.generated)
        yield self._known[key]

    def _key(self, expert: str, request: GenerateRequest) -> str:
        asked = asdict(request) | {"stream": None, "deadline_s": None, "id": None}
        spec = self._snapshot.experts[expert]
        base = None if spec.base is None else self._snapshot.experts[spec.base].digest
        return hashlib.sha256(json.dumps([spec.digest, base, self._dtype, asked]).encode()).hexdigest()[:32]
