"""Tiny teachers that ship with the package: three trained on speech, two with random weights.

    tiny_hubert             HuBERT, two iterations of masked prediction of units
    tiny_robust_hubert      tiny_hubert, trained further with noisy and reverberant speech
    tiny_wavlm              WavLM: masked prediction from mixtures with other speech or noise
    tiny_hubert_random      the architecture of the first two, random weights
    tiny_wavlm_random       the architecture of the third, random weights

They are for trying out distillation offline in minutes; they are not useful as speech features.
Use the names as ``teachers.NAME.model`` in a model config, or as upstreams of ``s3prl.hub``
(``run_downstream.py -u tiny_wavlm``). The classes are s3prl's own, with 6 layers of width 192,
3.3 M parameters, and one frame every 320 samples at 16 kHz. ``files/`` has the weights in float16
in s3prl's checkpoint formats. ``cards/`` has the model cards: training data and licences, recipe,
scores, limits. They were trained with ``tools/train_tiny_teachers.py``.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import SetupError

TEACHERS = ("tiny_hubert", "tiny_robust_hubert", "tiny_wavlm")
# teacher with random weights -> trained teacher of the same architecture
RANDOM_INIT = {"tiny_hubert_random": "tiny_hubert", "tiny_wavlm_random": "tiny_wavlm"}
NAMES = (*TEACHERS, *RANDOM_INIT)

_FOLDER = Path(__file__).parent


def checkpoint_path(name: str) -> Path:
    """Path of a teacher's checkpoint; for one of :data:`RANDOM_INIT`, of its trained teacher's.

    Raises:
        SetupError: no such name, or the file is missing from the installation.
    """
    return _find(RANDOM_INIT.get(name, name), "files", ".pt")


def card(name: str) -> Path:
    """Path of the model card (Markdown) of one of :data:`TEACHERS`.

    Raises:
        SetupError: no such name, or the file is missing from the installation.
    """
    return _find(name, "cards", ".md")


def _find(name: str, folder: str, suffix: str) -> Path:
    if name not in TEACHERS:
        raise SetupError(f"no such tiny teacher {name!r}; use one of: {', '.join(NAMES)}")
    path = _FOLDER / folder / f"{name}{suffix}"
    if not path.is_file():
        raise SetupError(f"{path} is missing from the installation; reinstall s3prl_ekd")
    return path
