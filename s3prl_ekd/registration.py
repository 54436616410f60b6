"""The doors into s3prl: names in ``s3prl.hub``, the package ``pretrain``, the corpus of PR.

s3prl finds an upstream by ``getattr(s3prl.hub, name)`` and a pretraining method by
``import_module("pretrain.NAME.pretrain_expert")``; nothing of it is edited or copied.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from . import compat
from .compat import no_eval
from .compat.child_processes import repeat_in_children
from .compat.import_hooks import on_import
from .errors import SetupError
from .teachers import zoo

ENTRIES = ("ekd_student", "ekd_student_local", "ekd_student_url", *zoo.NAMES)

# s3prl's pretraining code imports these by their bare names, because it is meant to run inside
# s3prl's own folder. Under the bare name of the installed module there is one copy of each class.
BARE_NAMES = ("optimizers", "schedulers", "utility", "utility.helper", "upstream", "pretrain")

HUB = "s3prl.hub"


def register() -> None:
    """Add ``ekd_student`` and the tiny teachers to ``s3prl.hub``, and PR's corpus module where it
    is missing.

    Calling it twice changes nothing.

    Raises:
        SetupError: the hub has another entry of that name.
    """
    compat.apply()
    no_eval.guard()
    from s3prl import hub

    from .downstream.requirements import provide_ctc_corpus
    from .upstream import hubconf

    for name in ENTRIES:
        ours = getattr(hubconf, name)
        if getattr(hub, name, ours) is not ours:
            raise SetupError(f"s3prl.hub has another {name} already; remove that plugin first")
        setattr(hub, name, ours)
    provide_ctc_corpus(Path.cwd())
    repeat_in_children(_register_on_import)


def _register_on_import() -> None:
    """:func:`register`, once the hub is imported: that takes seconds, and few children use it."""
    if HUB in sys.modules:
        register()
    else:
        on_import(HUB, _run_and_register)


def _run_and_register(module: ModuleType, run: Callable[[ModuleType], None]) -> None:
    run(module)
    register()


def open_pretrain(folder: Path) -> None:
    """Make ``pretrain.*`` importable: s3prl's own modules, and those below ``folder/pretrain``.

    For an installed s3prl; inside a checkout the bare names are found without help.
    """
    for name in BARE_NAMES:
        if name not in sys.modules:
            sys.modules[name] = importlib.import_module(f"s3prl.{name}")
    repeat_in_children(open_pretrain, folder.absolute())
    package = sys.modules["pretrain"]
    here = str(folder / "pretrain")
    if here not in package.__path__:
        package.__path__.append(here)
    if "pretrain.runner" not in sys.modules:
        sys.modules["pretrain.runner"] = importlib.import_module("s3prl.pretrain.runner")
