"""The corpus module of PR, which s3prl's wheel lacks."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from ..compat.child_processes import repeat_in_children

CTC_CORPUS = "s3prl.downstream.ctc.corpus"  # in s3prl's repository, and not in its wheel


def provide_ctc_corpus(folder: Path) -> None:
    """Make ``s3prl.downstream.ctc.corpus.libriphone`` importable. Calling it twice changes nothing.

    The installed s3prl's own module is taken, else that of the checkout at ``folder``, else ours:
    :mod:`.libriphone`.

    Raises:
        ImportError: s3prl or torch is not installed.
    """
    name = f"{CTC_CORPUS}.libriphone"
    if sys.modules.get(name) is not None:
        return
    repeat_in_children(provide_ctc_corpus, folder.resolve())
    ctc = importlib.import_module("s3prl.downstream.ctc")
    checkout = folder.resolve() / "downstream" / "ctc"
    if (checkout / "corpus" / "libriphone.py").is_file():
        ctc.__path__.append(str(checkout))  # last: the installed one comes first
    if importlib.util.find_spec(CTC_CORPUS) and importlib.util.find_spec(name):
        return
    package = ModuleType(CTC_CORPUS, "Stand-in of s3prl_ekd for a folder that this s3prl lacks.")
    package.__path__ = []
    libriphone = importlib.import_module("s3prl_ekd.downstream.libriphone")
    vars(package)["libriphone"], vars(ctc)["corpus"] = libriphone, package
    sys.modules.update({CTC_CORPUS: package, name: libriphone})
