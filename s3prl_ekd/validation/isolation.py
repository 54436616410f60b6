"""A process in which a package has torch and itself: no network, none of the blocked packages.

This keeps honest packages honest; it is no cage. Whoever validates a package runs its code.
"""

from __future__ import annotations

import importlib.abc
import sys

BLOCKED = ("s3prl", "fairseq", "s3prl_ekd")
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


class NetworkBlocked(OSError):
    """Something was to be fetched."""


class Watch:
    """What was asked for and refused: ``hosts`` and ``packages``, in order and without repeats."""

    def __init__(self):
        self.hosts: dict[str, None] = {}
        self.packages: dict[str, None] = {}

    def block(self) -> None:
        """From here on; it cannot be taken back in this process."""
        for name in [name for name in sys.modules if name.split(".")[0] in BLOCKED]:
            del sys.modules[name]  # ours, which this process has needed until now
        sys.meta_path.insert(0, _Finder(self))
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple) -> None:
        if event not in _NETWORK:
            return
        # socket.connect(socket, address), socket.getaddrinfo(host, port, ...)
        address = args[1] if event in ("socket.connect", "socket.sendto") else args[0]
        if isinstance(address, (str, bytes)) and event in ("socket.connect", "socket.sendto"):
            return  # a path: a socket of this machine, as worker processes use
        host = address[0] if isinstance(address, tuple) else address
        host = host.decode(errors="replace") if isinstance(host, bytes) else str(host)
        self.hosts[host] = None
        raise NetworkBlocked(f"the network is blocked here ({host})")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, watch: Watch):
        self.watch = watch

    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in BLOCKED:
            return None
        self.watch.packages[top] = None
        raise ModuleNotFoundError(f"{name} is not there in SUPERB's evaluation", name=name)


def force_data_only(torch) -> None:
    """``torch.load`` with ``weights_only=True``, whatever is asked for: no code of a file runs."""
    load = torch.load

    def load_data(f, map_location=None, pickle_module=None, **kwargs):
        return load(f, map_location=map_location, **{**kwargs, "weights_only": True})

    torch.load = torch.serialization.load = load_data
