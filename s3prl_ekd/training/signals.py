"""Signals that ask a run to leave: it finishes its step and saves first."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

# SIGTERM: kill, scancel, docker stop. SIGINT: Ctrl-C. SIGUSR1: sbatch --signal=USR1@SECONDS.
# Windows has no SIGUSR1.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)
# Where a wrapper hands Ctrl-C on, the one key arrives twice.
SAME_KEY = 0.5  # seconds


def exit_code(name: str) -> int:
    """What shells call a process ended by the signal of that name: 143, 130 or 138."""
    return 128 + int(signal.Signals[name])


class StopSignals:
    """Within the context, such a signal sets ``received`` and nothing else; the loop looks at it.

    A further Ctrl-C raises KeyboardInterrupt at once. Outside the main thread, where Python has no
    signals, the context does nothing.

    Args:
        quiet: say nothing; of several processes one speaks.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.received: signal.Signals | None = None
        self._at = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._handle) for each in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = signal.Signals(number), now
            if self.quiet:
                return
            hint = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ""
            # Not print: a handler may come in the middle of another print to the same stream.
            os.write(2, f"\n{self.received.name}: saving after this step{hint}\n".encode())
        elif number == signal.SIGINT and now - self._at > SAME_KEY:
            raise KeyboardInterrupt
