"""Teachers by s3prl's hub names.

Names are looked up in s3prl's ``upstream.<family>.hubconf`` modules and not in ``s3prl.hub``,
which imports all of its 35 families first (seconds, and more packages).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping

from torch import nn

from .. import compat
from ..errors import TeacherError
from ..files import trust

FAMILIES = ("hubert", "wavlm", "wav2vec2", "data2vec", "unispeech_sat", "distiller")
_NOT_NAMES = ("_local", "_url", "_custom", "_gdriveid")  # entries that want a path of their own


@functools.cache
def names_by_family() -> Mapping[str, Mapping[str, Callable[..., nn.Module]]]:
    """Family -> hub name -> s3prl's loader, for every entry that needs no path."""
    compat.apply()
    families = {}
    for family in FAMILIES:
        module = importlib.import_module(f"s3prl.upstream.{family}.hubconf")
        entries = families[family] = {}
        for name, value in vars(module).items():
            own = callable(value) and getattr(value, "__module__", None) == module.__name__
            if own and not name.startswith("_") and not name.endswith(_NOT_NAMES):
                entries[name] = value
    return families


@functools.cache
def hub_entries() -> Mapping[str, Callable[..., nn.Module]]:
    """Hub name -> s3prl's loader, over all of :data:`FAMILIES`."""
    families = names_by_family().values()
    return {name: entry for entries in families for name, entry in entries.items()}


def load_hub_name(name: str, where: str) -> nn.Module:
    """Download (or find in s3prl's cache) and load one upstream.

    Raises:
        TeacherError: the download failed.
    """
    import requests  # s3prl downloads with it, so it is there

    trust.restrict_torch()
    compat.apply()  # again, as torch may refuse more classes by now
    try:
        upstream = hub_entries()[name]()
    except (requests.RequestException, OSError) as error:
        raise TeacherError(
            f"{where}: the download of {name} failed ({type(error).__name__}); fetch it on a "
            "machine with network access and give the path of the file instead"
        ) from None
    if name in names_by_family()["distiller"]:
        from .distilhubert import DistilHubertUpstream

        # s3prl's expert puts the heads' predictions behind the layers; a teacher has layers only.
        return DistilHubertUpstream(upstream.model.model)
    return upstream
