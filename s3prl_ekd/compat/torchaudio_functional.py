"""``torchaudio.functional``, imported after the shims are applied.

Where torchaudio's compiled extension does not load, importing torchaudio fails before
:func:`compat.apply`. As a module, this also runs in spawned worker processes.
"""

from .. import compat

compat.apply()

from torchaudio import functional  # noqa: E402

__all__ = ["functional"]
