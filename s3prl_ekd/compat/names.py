"""Names that s3prl imports and that other packages have dropped."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any, NoReturn

from ..errors import SetupError
from .shim import Shim

HUB_NAMES = ("HfFolder", "Repository")


class _Gone(type):
    """A class that can be imported, and raises when it is used."""

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("__"):  # what inspection looks for is not use
            raise AttributeError(name)
        raise SetupError(_gone_message(f"{cls.__name__}.{name}"))

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise SetupError(_gone_message(f"{cls.__name__}(...)"))


def _gone_message(use: str) -> str:
    return (
        f"huggingface_hub.{use} does not exist since huggingface_hub 1.0, so s3prl cannot upload "
        "or sign in here: leave out --hub huggingface and --push_to_hf_hub"
    )


def _hub_lacks(name: str) -> bool:
    return not hasattr(importlib.import_module("huggingface_hub"), name)


def _add_hub_names() -> None:
    hub = importlib.import_module("huggingface_hub")
    for name in filter(_hub_lacks, HUB_NAMES):
        setattr(hub, name, _Gone(name, (), {"__module__": __name__}))


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
    """1 or 0 for the usual words for yes and no, in any case; else :class:`ValueError`."""
    word = value.lower()
    if word in TRUE or word in FALSE:
        return int(word in TRUE)
    raise ValueError(f"{value!r} is neither yes nor no")


def _no_distutils() -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.10 and 3.11
            importlib.import_module("distutils.util")
    except ModuleNotFoundError:
        return True
    return False


def _add_distutils() -> None:
    # setuptools brings its own distutils, which appears once setuptools is imported
    try:
        importlib.import_module("setuptools")
    except ModuleNotFoundError:
        pass
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
    summary="setuptools' own distutils, else a stand-in with strtobool only",
    missing=_no_distutils,
    apply=_add_distutils,
)
