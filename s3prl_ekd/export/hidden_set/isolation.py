"""A process in which a package has torch and itself: no network, none of the blocked packages.

This keeps honest packages honest; it is no cage. Whoever validates a package runs its code.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.abc
import os
import signal
import sys
from pathlib import Path
from typing import Any

BLOCKED = ("s3prl", "fairseq", "s3prl_ekd")
_CALLS = ("socket.connect", "socket.sendto", "socket.sendmsg")  # of (socket, address)
_LOOK_UPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")  # of (host, ...)
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000  # CLONE_NEWUSER and CLONE_NEWNET of <linux/sched.h>
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


class NetworkBlocked(OSError):
    """Something was to be fetched."""


class Watch:
    """What was asked for and refused: ``hosts`` and ``packages``, in order and without repeats."""

    def __init__(self) -> None:
        self.hosts: dict[str, None] = {}
        self.packages: dict[str, None] = {}

    def block(self) -> None:
        """From here on; it cannot be taken back in this process."""
        for name in [name for name in sys.modules if name.split(".")[0] in BLOCKED]:
            del sys.modules[name]  # ours, which this process has needed until now
        sys.meta_path.insert(0, _Finder(self))
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple) -> None:
        if event in _CALLS:
            address = args[1]
            if address is None or isinstance(address, (str, bytes)):
                return  # a path or a connected pair: sockets of this machine, as workers use
        elif event in _LOOK_UPS:
            address = args[0]
        else:
            return
        host = address[0] if isinstance(address, tuple) else address
        host = host.decode(errors="replace") if isinstance(host, bytes) else str(host)
        self.hosts[host] = None
        raise NetworkBlocked(f"the network is blocked here ({host})")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, watch: Watch):
        self.watch = watch

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        top = name.split(".")[0]
        if top not in BLOCKED:
            return
        self.watch.packages[top] = None
        raise ModuleNotFoundError(f"{name} is not there in SUPERB's evaluation", name=name)


def leave_network() -> bool:
    """Move this process, and all that it starts, to where there is no network interface.

    To be called while it has one thread. Returns False where the system does not allow it (not
    Linux, or user namespaces are forbidden): then :class:`Watch` alone stands before the network.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)  # whoever started this has been killed
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_USER | _NEW_NET) != 0:
        return False
    with contextlib.suppress(OSError):  # without it the process has no name, but runs
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return True


def force_data_only(torch: Any) -> None:
    """``torch.load`` with ``weights_only=True``, whatever is asked for: no code of a file runs."""
    load = torch.load

    def load_data(
        f: Any, map_location: Any = None, pickle_module: Any = None, **kwargs: Any
    ) -> Any:
        return load(f, map_location=map_location, **{**kwargs, "weights_only": True})

    torch.load = torch.serialization.load = load_data
