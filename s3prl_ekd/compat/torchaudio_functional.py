"""torchaudio's functions, once what is missing from the installed torchaudio is in place.

A module of its own because the order matters: on a torchaudio without its compiled part the
import fails before :func:`compat.apply`. A spawned worker process imports this afresh.
"""

from .. import compat

compat.apply()

from torchaudio import functional  # noqa: E402

__all__ = ["functional"]
