"""Block network access and imports of s3prl, fairseq and s3prl_ekd in the package's process.

This finds unintended dependencies; it does not confine hostile code.
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
# Audit events of Python, with arguments (socket, address) and (host, ...).
_CALLS = ("socket.connect", "socket.sendto", "socket.sendmsg")
_LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000  # CLONE_NEWUSER and CLONE_NEWNET of <linux/sched.h>
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


class AccessBlocker(importlib.abc.MetaPathFinder):
    """Blocks network access and imports, and records them.

    Attributes:
        hosts, packages: names of what was blocked, in order, as dict keys.
    """

    def __init__(self) -> None:
        self.hosts: dict[str, None] = {}
        self.packages: dict[str, None] = {}

    def block(self) -> None:
        """Start blocking; it cannot be undone in this process."""
        for name in [name for name in sys.modules if name.split(".")[0] in BLOCKED]:
            del sys.modules[name]  # so that the package cannot import it
        sys.meta_path.insert(0, self)
        sys.addaudithook(self._audit)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Called for each import; raises ModuleNotFoundError for those that are blocked."""
        top = name.split(".")[0]
        if top in BLOCKED:
            self.packages[top] = None
            raise ModuleNotFoundError(f"{name} is not installed in SUPERB's evaluation", name=name)

    def _audit(self, event: str, args: tuple) -> None:
        if event not in (*_CALLS, *_LOOKUPS):
            return
        address = args[1] if event in _CALLS else args[0]
        if event in _CALLS and (address is None or isinstance(address, (str, bytes))):
            return  # a path or a connected pair: local sockets, such as those of workers
        host = address[0] if isinstance(address, tuple) else address
        host = host.decode(errors="replace") if isinstance(host, bytes) else str(host)
        self.hosts[host] = None
        raise PermissionError(f"network access to {host} is blocked in this check")


def leave_network() -> bool:
    """Move this process and its future children to a network namespace without interfaces.

    Call it while the process has a single thread.

    Returns:
        False if the system does not allow it (not Linux, or no user namespaces). Then only
        :class:`AccessBlocker` blocks the network, and only for Python code.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)  # die with the parent process
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_USER | _NEW_NET) != 0:
        return False
    with contextlib.suppress(OSError):  # without the maps the process runs as nobody
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return True


def force_data_only(torch: Any) -> None:
    """Make ``torch.load`` always use ``weights_only=True``, so that no code in a file runs."""
    load = torch.load

    def load_data(
        f: Any, map_location: Any = None, pickle_module: Any = None, **kwargs: Any
    ) -> Any:
        return load(f, map_location=map_location, **{**kwargs, "weights_only": True})

    torch.load = torch.serialization.load = load_data
