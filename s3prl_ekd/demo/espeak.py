"""Speech synthesis with espeak-ng through its C interface.

The library and its data come from the PyPI wheel ``espeakng_loader``, so neither a system package
nor the network is needed. Its state is global, hence the lock. Two phases, of the flutter and of
the harmonic synthesiser, carry over from one utterance to the next, and no call resets them. Voices
of the Klatt synthesiser without flutter do not depend on them. :mod:`s3prl_ekd.demo.voices` makes
only such voices, so the same text gives the same samples.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SetupError

# Constants of espeak-ng's speak_lib.h.
_SYNCHRONOUS = 2  # espeak_Synth returns after the callback has received all samples
_DONT_EXIT = 0x8000  # return errors instead of exiting the process
_UTF8 = 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_QUIET = 50  # volume, 0 to 100; some Klatt sources clip at the default volume
# The C code copies the data folder's path into a buffer of 160 bytes.
_MAX_PATH_BYTES = 140

_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)
_lock = threading.Lock()


class Espeak:
    """The loaded library. Use :func:`espeak`, which loads it once per process."""

    def __init__(self, library: str, data: str) -> None:
        """Load ``library`` and initialise it with the folder ``data`` (``espeak-ng-data``)."""
        try:
            self._lib = ctypes.CDLL(library)
        except OSError as error:
            raise SetupError(f"cannot load espeak-ng from {library}: {error}") from error
        if not hasattr(self._lib, "espeak_ng_SetRandSeed"):
            raise SetupError("espeak-ng is older than 1.52; type: pip install -U espeakng-loader")
        path = os.fsencode(_short_path(data))
        self.rate = self._lib.espeak_Initialize(_SYNCHRONOUS, 0, path, _DONT_EXIT)  # Hz
        if self.rate <= 0:
            raise SetupError(f"espeak-ng cannot read its data in {data}")
        self._chunks: list[bytes] = []
        self._callback = _CALLBACK(self._collect)  # a reference: C has only a pointer to it
        self._lib.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: Any, count: int, events: Any) -> int:
        if count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0  # continue

    def synthesise(self, text: str, voice: str, *, rate: int, pitch: int) -> np.ndarray:
        """Synthesise ``text``: 16-bit samples at :attr:`rate` Hz, [samples].

        Args:
            voice: contents of an espeak-ng voice file.
            rate: words per minute, 80 to 450.
            pitch: 0 to 100; 50 is the voice's default.
        """
        with _lock, tempfile.TemporaryDirectory(prefix="ekd_voice_") as folder:
            file = Path(folder, "voice")
            file.write_text(voice, encoding="utf-8")
            # It reports no error for most mistakes in a voice file.
            if self._lib.espeak_SetVoiceByFile(os.fsencode(file)) != 0:
                raise SetupError(f"espeak-ng cannot read the voice file {file}")
            settings = {_RATE: rate, _VOLUME: _QUIET, _PITCH: pitch, _RANGE: 50}
            for parameter, value in settings.items():
                self._lib.espeak_SetParameter(parameter, value, 0)
            self._lib.espeak_ng_SetRandSeed(ctypes.c_long(1))  # for the breath noise
            self._chunks.clear()
            data = text.encode("utf-8")
            code = self._lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8, None, None)
            if code != 0 or not self._chunks:
                raise SetupError(f"espeak-ng cannot synthesise {text!r} (code {code})")
            return np.frombuffer(b"".join(self._chunks), dtype=np.int16).copy()


def _short_path(data: str) -> str:
    """Return ``data`` or, if its path is too long, a symlink to it that is removed at exit."""
    if len(os.fsencode(data)) <= _MAX_PATH_BYTES:
        return data
    folder = tempfile.mkdtemp(prefix="ekd_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    link = Path(folder, "espeak-ng-data")
    link.symlink_to(data, target_is_directory=True)
    return str(link)


@cache
def espeak() -> Espeak:
    """Return this process's :class:`Espeak`."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise SetupError(
            "the synthetic corpus needs espeak-ng; type: pip install espeakng-loader"
        ) from error
    return Espeak(espeakng_loader.get_library_path(), espeakng_loader.get_data_path())
