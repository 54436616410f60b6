"""Three tiny teachers that have learned speech, shipped with the package.

    tiny_hubert             HuBERT, two iterations of masked prediction of units
    tiny_robust_hubert      the same model, trained on with noisy and reverberant speech
    tiny_wavlm              WavLM: masked prediction while other speech or noise is mixed in
    tiny_hubert_random      the architecture of the first two with fresh random weights
    tiny_wavlm_random       the architecture of the third with fresh random weights

The names stand wherever a teacher's source does (``teachers.NAME.model`` in a model config), and
are upstreams of ``s3prl.hub`` (``run_downstream.py -u tiny_wavlm``). The classes are s3prl's own,
with 6 layers of 192 and 3.3 M parameters; one frame every 320 samples at 16 kHz. ``files/`` has the
weights in float16 in s3prl's checkpoint formats; ``cards/`` says of each what it was trained on and
under which licences, how, and what it cannot do. They are there to try distillation offline and in
minutes, not to be features for anything real. ``tools/train_tiny_teachers.py`` made them.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import SetupError

TEACHERS = ("tiny_hubert", "tiny_robust_hubert", "tiny_wavlm")
# random twin -> the teacher whose architecture it has
TWINS = {"tiny_hubert_random": "tiny_hubert", "tiny_wavlm_random": "tiny_wavlm"}
NAMES = (*TEACHERS, *TWINS)

_HERE = Path(__file__).parent


def weights(name: str) -> Path:
    """The checkpoint of one of :data:`TEACHERS`, or of the teacher that a twin is modelled on.

    Raises:
        SetupError: no such name, or the installation lacks the file.
    """
    return _find(TWINS.get(name, name), "files", ".pt")


def card(name: str) -> Path:
    """The model card (Markdown) of one of :data:`TEACHERS`. Raises: see :func:`weights`."""
    return _find(name, "cards", ".md")


def _find(name: str, folder: str, suffix: str) -> Path:
    if name not in TEACHERS:
        raise SetupError(f"there is no tiny teacher {name!r}; known: {', '.join(NAMES)}")
    path = _HERE / folder / f"{name}{suffix}"
    if not path.is_file():
        raise SetupError(f"{path} is missing from this installation; install s3prl_ekd again")
    return path
