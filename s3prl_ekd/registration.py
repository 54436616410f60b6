"""Make this package's upstreams and pretraining method available to an installed s3prl.

s3prl looks up an upstream by ``getattr(s3prl.hub, name)`` and a pretraining method by
``import_module("pretrain.NAME.pretrain_expert")``. No file of s3prl is edited or copied.
"""

from __future__ import annotations

import functools
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

# As in s3prl, entries that need a path or URL are NAME_custom, NAME_local and NAME_url.
STUDENT_ENTRIES = tuple(f"ekd_student{suffix}" for suffix in ("", "_custom", "_local", "_url"))
ENTRIES = (*STUDENT_ENTRIES, *zoo.NAMES)

# s3prl's pretraining code imports these without the prefix `s3prl.`. They become aliases of the
# installed modules, so that each class exists once.
BARE_NAMES = ("optimizers", "schedulers", "utility", "utility.helper", "upstream", "pretrain")


def register() -> None:
    """Add ``ekd_student`` and the tiny teachers to ``s3prl.hub``, and the corpus module of PR if
    s3prl lacks it. If this imports the hub, transformers is imported only when a Hugging Face
    upstream is built. Further calls change nothing.

    Raises:
        SetupError: ``s3prl.hub`` has another entry of the same name.
    """
    compat.apply()
    _import_transformers_late()
    no_eval.block_eval()
    from s3prl import hub

    from .downstream.requirements import provide_ctc_corpus
    from .upstream import hubconf

    for name in ENTRIES:
        entry = getattr(hubconf, name)
        if getattr(hub, name, entry) is not entry:
            raise SetupError(
                f"s3prl.hub already has another {name}; remove the plugin that adds it"
            )
        setattr(hub, name, entry)
    if "ekd_student" in hub.options(True):
        hub.options = functools.partial(_options, hub.options)
    provide_ctc_corpus(Path.cwd())
    repeat_in_children(_register_on_import)


def _options(options: Callable[[bool], list[str]], only_registered_ckpt: bool = False) -> list[str]:
    """s3prl's list of upstreams, where ``ekd_student`` needs a path in spite of its name."""
    names = options(only_registered_ckpt)
    return [name for name in names if not only_registered_ckpt or name != "ekd_student"]


def _register_on_import() -> None:
    """Call :func:`register` when the hub is imported; few children do, and it takes time."""
    if "s3prl.hub" in sys.modules:
        register()
    else:
        _import_transformers_late()
        on_import("s3prl.hub", _run_and_register)


def _import_transformers_late() -> None:
    from .compat.huggingface_upstreams import import_transformers_late

    import_transformers_late()


def _run_and_register(module: ModuleType, run: Callable[[ModuleType], None]) -> None:
    run(module)
    register()


def expose_pretrain(folder: Path) -> None:
    """Make ``pretrain.*`` importable: s3prl's own modules and those below ``folder/pretrain``.

    For an installed s3prl. In a checkout of s3prl they can be imported already.
    """
    for name in BARE_NAMES:
        if name not in sys.modules:
            sys.modules[name] = importlib.import_module(f"s3prl.{name}")
    repeat_in_children(expose_pretrain, folder.absolute())
    package = sys.modules["pretrain"]
    pretrain_folder = str(folder / "pretrain")
    if pretrain_folder not in package.__path__:
        package.__path__.append(pretrain_folder)
    if "pretrain.runner" not in sys.modules:
        sys.modules["pretrain.runner"] = importlib.import_module("s3prl.pretrain.runner")
