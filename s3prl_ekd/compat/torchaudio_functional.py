"""``torchaudio.functional``, imported after the shims are applied.

Where torchaudio's compiled extension does not load, importing torchaudio fails before
:func:`compat.apply`. Being a module, this also runs in a spawned worker process.
"""

from .. import compat

compat.apply()

from torchaudio import functional  # noqa: E402

__all__ = ["functional"]
