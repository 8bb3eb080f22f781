"""Record what each client sends: `python tests/clients/record.py` writes tests/coe/protocol/client_bodies.jsonl.

The clients run against the scripted endpoint alone, so that nothing refuses what they send. Bodies that differ only in
their texts are written once. `--client NAME` records that client, and keeps the lines of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[2]))
from clients import CLIENTS, ENVIRONMENTS, Client, outcomes
from service import MODEL, scripted_endpoint

from examples.zoo.fetch import fetch

TARGET: Final = Path(__file__).parents[1] / "coe" / "protocol" / "client_bodies.jsonl"
Bodies = list[tuple[str, dict[str, Any]]]


def main() -> None:
    """Run the clients and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    parser.add_argument("--client", action="append", choices=[client.name for client in CLIENTS])
    options = parser.parse_args()
    os.environ["COE_CLIENTS_TOKENIZER"] = str(fetch("smollm2"))
    old = [json.loads(line) for line in TARGET.read_text().splitlines()] if options.client else []
    lines: list[dict[str, Any]] = []
    bodies: Bodies = []
    with scripted_endpoint(lambda path, body: bodies.append((path, body))) as url:
        for client in CLIENTS:
            if options.client and client.name not in options.client:
                lines += [line for line in old if line["client"].rpartition(" ")[0] == client.name]
            else:
                print(client.name, file=sys.stderr)
                lines += recorded(client, options.environments, url, bodies)
    TARGET.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def recorded(client: Client, environments: Path, url: str, bodies: Bodies) -> list[dict[str, Any]]:
    """The lines of one client; `bodies` is filled by the endpoint at `url`."""
    lines: dict[str, dict[str, Any]] = {}
    version = ""
    for outcome in outcomes(client, environments, url, MODEL):
        version = outcome.get("version", version)
        sent, bodies[:] = list(bodies), []
        if outcome.get("outcome") == "fails":
            raise SystemExit(f"{client.name}, {outcome['feature']}: {outcome['detail']}")
        if outcome.get("feature", "error").startswith("error"):
            continue
        for path, body in sent:
            line = {"client": f"{client.name} {version}", "feature": outcome["feature"], "path": path, "body": body}
            lines.setdefault(path + json.dumps(_shape(body)), line)
    return list(lines.values())


def _shape(value: Any) -> Any:
    """The value without its texts: what makes a body different from another one."""
    if isinstance(value, dict):
        return {key: inner if key in ("role", "type") else _shape(inner) for key, inner in value.items()}
    return [_shape(inner) for inner in value] if isinstance(value, list) else "" if isinstance(value, str) else value


if __name__ == "__main__":
    main()
