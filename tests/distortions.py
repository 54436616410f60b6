"""Settings of distortions, and files of noise and impulse responses for them."""

from pathlib import Path

import numpy as np
import soundfile

from s3prl_ekd.data.distortion.settings import DistortionSettings
from s3prl_ekd.files.config import from_plain_data

from .conftest import make_sound

RATE = 16000


def only(part: str, kind: str, **more) -> DistortionSettings:
    """Settings with which only one kind of one part is drawn."""
    weights = {
        "additive_weights": {"noise": 0, "gaussian": 0, "babble": 0, "clean": 0},
        "convolutive_weights": {"reverb": 0, "pitch": 0, "band_reject": 0, "clean": 0},
    }
    other_part = next(name for name in weights if not name.startswith(part))
    weights[f"{part}_weights"][kind] = 1
    weights[other_part]["clean"] = 1
    return from_plain_data(DistortionSettings, {"setup": "setup1", **weights, **more}, "distortion")


def write_sources(folder: Path) -> dict[str, list[str]]:
    """A folder of noise (a long, a short and a silent file) and one of two impulse responses."""
    noise, rooms = folder / "noise", folder / "rooms"
    (noise / "subfolder").mkdir(parents=True)
    rooms.mkdir()
    soundfile.write(noise / "long.wav", make_sound(3.0, seed=21), RATE, subtype="FLOAT")
    soundfile.write(
        noise / "subfolder" / "short.wav", make_sound(0.3, seed=22), RATE, subtype="FLOAT"
    )
    soundfile.write(noise / "zero.wav", np.zeros(5000), RATE, subtype="PCM_16")
    for i in range(2):
        room = 0.1 * make_sound(0.2, seed=30 + i)
        room[50] = 1.0  # the direct path comes 50 samples late
        soundfile.write(rooms / f"{i}.wav", room, RATE, subtype="FLOAT")
    return {"noise": [str(noise)], "impulses": [str(rooms)]}
