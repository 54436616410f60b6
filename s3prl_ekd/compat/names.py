"""Shims for names that s3prl imports and newer packages have removed."""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from types import ModuleType
from typing import Any, NoReturn

from ..errors import SetupError
from .shim import Shim

HUB_NAMES = ("HfFolder", "Repository")


class _RemovedClass(type):
    """Metaclass of placeholders that can be imported but raise when they are used."""

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("__"):  # looked up by inspection, not by s3prl
            raise AttributeError(name)
        raise SetupError(_removed_message(f"{cls.__name__}.{name}"))

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise SetupError(_removed_message(f"{cls.__name__}(...)"))


def _removed_message(use: str) -> str:
    return (
        f"huggingface_hub.{use} was removed in huggingface_hub 1.0, so s3prl cannot upload or log "
        "in; leave out --hub huggingface and --push_to_hf_hub"
    )


def _hub_lacks(name: str) -> bool:
    return not hasattr(importlib.import_module("huggingface_hub"), name)


def _add_hub_names() -> None:
    hub = importlib.import_module("huggingface_hub")
    for name in filter(_hub_lacks, HUB_NAMES):
        setattr(hub, name, _RemovedClass(name, (), {"__module__": __name__}))


HUGGINGFACE_HUB = Shim(
    name="huggingface_hub.HfFolder",
    needed_by=("downstream/runner.py:27", "run_downstream.py:17"),
    since="huggingface_hub 1.0",
    summary="HfFolder and Repository can be imported, and raise when used",
    missing=lambda: any(map(_hub_lacks, HUB_NAMES)),
    apply=_add_hub_names,
)

TRUE = frozenset({"y", "yes", "t", "true", "on", "1"})
FALSE = frozenset({"n", "no", "f", "false", "off", "0"})


def strtobool(value: str) -> int:
    """1 for a text in ``TRUE``, 0 for one in ``FALSE``, ignoring case; else raises ValueError."""
    lowered = value.lower()
    if lowered in TRUE or lowered in FALSE:
        return int(lowered in TRUE)
    raise ValueError(f"expected yes or no, got {value!r}")


def _no_distutils() -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.10 and 3.11
            importlib.import_module("distutils.util")
    except ModuleNotFoundError:
        return True
    return False


def _add_distutils() -> None:
    # setuptools has its own distutils, which can be imported once setuptools is
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("setuptools")
    if not _no_distutils():
        return
    package, util = ModuleType("distutils"), ModuleType("distutils.util")
    package.__path__ = []
    vars(package)["util"], vars(util)["strtobool"] = util, strtobool
    sys.modules.update({"distutils": package, "distutils.util": util})


DISTUTILS = Shim(
    name="distutils.util.strtobool",
    needed_by=("upstream/distiller/builder.py:9", "upstream/mockingjay/builder.py:18"),
    since="Python 3.12",
    summary="setuptools' distutils if installed, else a replacement with strtobool only",
    missing=_no_distutils,
    apply=_add_distutils,
)
