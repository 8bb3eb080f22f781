"""Entry point of the `coe` command. It imports nothing heavy before Ctrl-C is under control."""

from __future__ import annotations

import signal


def main() -> None:
    """Import the commands and run one. Ctrl-C during the imports ends it after them, since an import can lose it."""
    asked: list[int] = []
    hears = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a background job of a shell does not
    if hears:
        signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    from coe.cli import app, interrupts

    if hears:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise SystemExit(interrupts.interrupted().exit_code)
    app.main()


if __name__ == "__main__":
    main()
