"""espeak-ng through its C interface: a voice and a text in, samples out.

The library and its data come from the PyPI wheel ``espeakng_loader``, so no system package and no
network is needed. It is one state machine a process, hence the lock, and it carries state from
one utterance into the next (the phase of its flutter, and of its harmonic synthesiser), which no
call resets. What does not depend on that state are voices of its Klatt synthesiser with flutter
off; :mod:`s3prl_ekd.demo.voices` makes only such voices, so the same text gives the same samples.
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
_SYNCHRONOUS = 2  # espeak_Synth returns when the callback has had every sample
_DONT_EXIT = 0x8000  # report an error instead of ending the process
_UTF8 = 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_QUIET = 50  # of 100: at its usual volume some Klatt sources clip
# Its C code keeps the data folder's path in a buffer of 160 bytes.
_LONGEST_PATH = 140

_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)
_lock = threading.Lock()


class Espeak:
    """The loaded library. Use :func:`espeak`, which loads it once a process."""

    def __init__(self, library: str, data: str) -> None:
        """Load ``library`` and start it with the folder ``data`` (``espeak-ng-data``).

        Raises:
            SetupError: the library cannot be loaded, is too old, or does not find its data.
        """
        try:
            self._lib = ctypes.CDLL(library)
        except OSError as error:
            raise SetupError(f"espeak-ng cannot be loaded from {library}: {error}") from error
        if not hasattr(self._lib, "espeak_ng_SetRandSeed"):
            raise SetupError("espeak-ng is older than 1.52; pip install -U espeakng-loader")
        path = os.fsencode(_short_path(data))
        self.rate = self._lib.espeak_Initialize(_SYNCHRONOUS, 0, path, _DONT_EXIT)  # Hz
        if self.rate <= 0:
            raise SetupError(f"espeak-ng does not find its data in {data}")
        self._pieces: list[bytes] = []
        self._callback = _CALLBACK(self._collect)  # kept: C holds only a pointer to it
        self._lib.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: Any, count: int, events: Any) -> int:
        if count > 0:
            self._pieces.append(ctypes.string_at(samples, 2 * count))
        return 0  # go on

    def synthesise(
        self, text: str, voice: str, *, rate: int, pitch: int = 50, range_: int = 50
    ) -> np.ndarray:
        """Say ``text``.

        Args:
            text: what to say.
            voice: the contents of an espeak-ng voice file.
            rate: words a minute, 80 to 450.
            pitch, range_: 0 to 100; 50 leaves the voice's own pitch and range.

        Returns:
            Samples of 16 bit at :attr:`rate` Hz, [samples].

        Raises:
            SetupError: espeak-ng fails. (It is silent about most mistakes in a voice file.)
        """
        with _lock, tempfile.TemporaryDirectory(prefix="ekd_voice_") as folder:
            file = Path(folder, "voice")
            file.write_text(voice, encoding="utf-8")
            if self._lib.espeak_SetVoiceByFile(os.fsencode(file)) != 0:
                raise SetupError(f"espeak-ng cannot read the voice file {file}")
            settings = {_RATE: rate, _VOLUME: _QUIET, _PITCH: pitch, _RANGE: range_}
            for parameter, value in settings.items():
                self._lib.espeak_SetParameter(parameter, value, 0)
            self._lib.espeak_ng_SetRandSeed(ctypes.c_long(1))  # of the breath noise
            self._pieces.clear()
            data = text.encode("utf-8")
            code = self._lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8, None, None)
            if code != 0 or not self._pieces:
                raise SetupError(f"espeak-ng cannot say {text!r} (code {code})")
            return np.frombuffer(b"".join(self._pieces), dtype=np.int16).copy()


def _short_path(data: str) -> str:
    """``data``, or a link to it for the rest of the process where its path is too long."""
    if len(os.fsencode(data)) <= _LONGEST_PATH:
        return data
    folder = tempfile.mkdtemp(prefix="ekd_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    link = Path(folder, "espeak-ng-data")
    link.symlink_to(data, target_is_directory=True)
    return str(link)


@cache
def espeak() -> Espeak:
    """The one :class:`Espeak` of this process.

    Raises:
        SetupError: the wheel ``espeakng_loader`` is not installed, or does not work here.
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise SetupError(
            "the synthetic corpus needs espeak-ng; type: pip install 's3prl_ekd[demo]'"
        ) from error
    return Espeak(espeakng_loader.get_library_path(), espeakng_loader.get_data_path())
