"""``run_downstream.py -m evaluate --noise DIR --snr DB``: a test under noise, with s3prl's experts.

The waveforms are changed on their way into the upstream, so that every recipe is served alike and
none is edited. Prediction files go to a folder of their own, ``EXPDIR/noisy/NAME_snrDB``.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SetupError
from ..files.overrides import literal

logger = logging.getLogger(__name__)

FOLDER = "noisy"  # below the run's
HELP = """\
Ours, beside s3prl's options below: -m evaluate under noise (predictions: EXPDIR/noisy/NAME_snrDB)
  --noise DIR       noises to add: a folder of audio, or a manifest (TSV), of which the test split
  --snr DB          signal-to-noise ratio over each utterance
  --noise_seed N    other draws of noises and starts (default: 0)
  e.g. run_downstream.py -m evaluate -t test -e CKPT --noise data/noise --snr 5
"""


@dataclass(frozen=True)
class NoisyTest:
    """What is added to the test set."""

    noise: str
    snr: float  # dB
    seed: int = 0

    @property
    def name(self) -> str:
        """A folder's name: ``NAME_snr5``, and ``NAME_snr5_seed1`` for other seeds than 0."""
        from .noise import condition_name

        return condition_name(self.noise, self.snr) + (f"_seed{self.seed}" if self.seed else "")

    @property
    def words(self) -> list[str]:
        """As typed; ``=`` because a value may begin with a dash."""
        return [f"--noise={self.noise}", f"--snr={self.snr!r}", f"--noise_seed={self.seed}"]


def split_arguments(argv: Sequence[str]) -> tuple[NoisyTest | None, list[str]]:
    """Our three options, and the other arguments, which are s3prl's.

    Raises:
        SetupError: one is missing or no number.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for name in ("--noise", "--snr", "--noise_seed"):
        parser.add_argument(name, nargs="?", const="")
    found, others = parser.parse_known_args(list(argv))
    if found.noise is None and found.snr is None and found.noise_seed is None:
        return None, others
    if not found.noise:
        raise SetupError("name the noises: --noise DIR, a folder of audio or a manifest (TSV)")
    if not found.snr:
        raise SetupError("name the signal-to-noise ratio in dB: --snr 5")
    try:
        snr = float(found.snr)
    except ValueError:
        snr = math.nan
    if not math.isfinite(snr):
        raise SetupError(f"--snr {found.snr}: a number of dB is needed, such as 5 or -2.5")
    try:
        seed = int(found.noise_seed or 0)
    except ValueError:
        raise SetupError(f"--noise_seed {found.noise_seed}: a whole number is needed") from None
    return NoisyTest(found.noise, snr, seed), others


def check(test: NoisyTest, mode: str | None) -> None:
    """Raise SetupError unless this run only evaluates, DataError unless there are noises."""
    if mode != "evaluate":
        raise SetupError(
            f"--noise goes with -m evaluate only, not with {f'-m {mode}' if mode else 'no -m'}: "
            "it tests a model that was trained without it"
        )
    from .noise import find_noises

    find_noises(test.noise)


def with_folder(argv: Sequence[str], test: NoisyTest, expdir: Path, override: str | None):
    """``argv`` with ``args.expdir`` put among the overrides, unless the user has put it there.

    Args:
        expdir: where s3prl would write, were it not for us.
        override: what ``-o`` says.
    """
    from ..files.atomic import make_folder
    from .script_args import without

    options = override.split(",,") if override else []
    if any(option.partition("=")[0].strip() == "args.expdir" for option in options):
        return list(argv)
    folder = expdir / FOLDER / test.name
    make_folder(folder, SetupError)
    text = ",,".join([*options, f"args.expdir={literal(str(folder))}"])
    return [*without(argv, ("-o", "--override")), "-o", text]


def noisy(runner: type, test: NoisyTest) -> type:
    """s3prl's downstream ``Runner`` with noise on whatever its upstream hears.

    The hook is set once the Runner is built: the second of made-up sound by which s3prl's
    Featurizer counts the layers goes by without it.
    """
    from .noise import find_noises, mix

    noises = find_noises(test.noise)
    logger.info("test under noise: one of %d noises at %g dB", len(noises), test.snr)

    def add_noise(module, args):
        waves, *others = args
        return [mix(wave, noises, test.snr, test.seed) for wave in waves], *others

    class NoisyRunner(runner):
        def __init__(self, args, config):
            super().__init__(args, config)
            self.upstream.model.register_forward_pre_hook(add_noise)

    return NoisyRunner
