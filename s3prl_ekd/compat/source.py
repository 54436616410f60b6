"""Names that s3prl's source defines, read as text: importing s3prl takes seconds."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Set
from pathlib import Path


def in_checkout(script: str) -> bool:
    """Whether the working folder is a checkout of s3prl with this script, such as
    ``run_pretrain.py``."""
    return Path(script).is_file() and Path("hub.py").is_file()


def script_options(script: str) -> Set[str]:
    """The options of one of s3prl's scripts, as typed: ``--seed``, ``-u``; empty without s3prl."""
    text = Path(script).read_text("utf-8") if in_checkout(script) else _text("s3prl", script)
    return set(re.findall(r"""["'](--?[A-Za-z]\w*)["']""", text))


def upstream_names(family: str = "*") -> Set[str]:
    """The functions in the hubconf of a family of upstreams, by default of all: ``hubert_base``."""
    return set(re.findall(r"^def ([A-Za-z]\w*)", _text("s3prl", _HUBCONF.format(family)), re.M))


def own_upstream_names() -> Set[str]:
    """The entries in this package's hubconf, functions or assigned: ``ekd_student``."""
    return set(re.findall(r"^(?:def )?([a-z]\w*)(?:\(| = )", _own_hubconf(), re.M))


def may_be_upstream(name: str) -> bool:
    """False only if ``name`` is nowhere in the files from which the hub takes its upstreams.

    These are s3prl's and this package's; True without s3prl.
    """
    text = _text("s3prl", "hub.py", _HUBCONF.format("*"), "downstream/*/hubconf.py")
    return not text or re.search(rf"\b{re.escape(name)}\b", text + _own_hubconf()) is not None


_HUBCONF = "upstream/{}/hubconf.py"


def _own_hubconf() -> str:
    return _text("s3prl_ekd.upstream", "hubconf.py")


def _text(package: str, *patterns: str) -> str:
    """The contents of a package's files; empty if it is not installed."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    return "\n".join(
        path.read_text("utf-8")
        for folder in folders or ()
        for pattern in patterns
        for path in sorted(Path(folder).glob(pattern))
    )
