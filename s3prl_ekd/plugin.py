"""The two doors into s3prl: names in ``s3prl.hub``, and the package ``pretrain``.

s3prl finds an upstream by ``getattr(s3prl.hub, name)`` and a pretraining method by
``import_module("pretrain.NAME.pretrain_expert")``; nothing of it is edited or copied.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from . import compat
from .errors import SetupError

ENTRIES = ("ekd_student", "ekd_student_local", "ekd_student_url")

# s3prl's pretraining code imports these by their bare names, because it is meant to run inside
# s3prl's own folder. Under the bare name of the installed module there is one copy of each class.
BARE_NAMES = ("optimizers", "schedulers", "utility", "utility.helper", "upstream", "pretrain")


def register() -> None:
    """Add the ``ekd_student`` entries to ``s3prl.hub``. Calling it twice changes nothing.

    Raises:
        SetupError: the hub has another entry of that name.
    """
    compat.apply()
    from s3prl import hub

    from .upstream import hubconf

    for name in ENTRIES:
        ours = getattr(hubconf, name)
        if getattr(hub, name, ours) is not ours:
            raise SetupError(f"s3prl.hub has another {name} already; remove that plugin first")
        setattr(hub, name, ours)


def open_pretrain(folder: Path) -> None:
    """Make ``pretrain.*`` importable: s3prl's own modules, and those below ``folder/pretrain``.

    For an installed s3prl; inside a checkout the bare names are found without help.
    """
    for name in BARE_NAMES:
        if name not in sys.modules:
            sys.modules[name] = importlib.import_module(f"s3prl.{name}")
    package = sys.modules["pretrain"]
    here = str(folder / "pretrain")
    if here not in package.__path__:
        package.__path__.append(here)
    if "pretrain.runner" not in sys.modules:
        sys.modules["pretrain.runner"] = importlib.import_module("s3prl.pretrain.runner")
