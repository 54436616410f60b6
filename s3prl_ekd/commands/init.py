"""Write what s3prl reads from the working folder: pretrain/ekd/ and downstream/.

Says `created` or `kept` for each file and never overwrites one, so it may be run again, also inside
a checkout of s3prl. The default experiment is always written, others when they are named. Corpora
that are named are checked and their paths put into every file that wants them.

example:
  s3prl-ekd init my_work && cd my_work
  s3prl-ekd init my_work --librispeech /data/LibriSpeech --voxceleb1 /data/VoxCeleb1 \
      --iemocap /data/IEMOCAP_full_release
  s3prl-ekd init . -x three_average --tiny
  s3prl-ekd init --list
"""

from __future__ import annotations

import argparse
import logging
import shlex
from pathlib import Path

from ..errors import SetupError
from ..workspace import Corpora, absolute, experiments, other_values, write_workspace

logger = logging.getLogger(__name__)

# Experiments of version 0.1.
RENAMED = {"reference": "s3prl_distiller", "three_standardised": "three_phi_s"}

CORPORA = {
    "librispeech": "train-clean-100/, dev-clean/, test-clean/ in it",
    "voxceleb1": "dev/wav/ and test/wav/ in it",
    "iemocap": "Session1/ to Session5/ in it",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dir", metavar="DIR", type=Path, nargs="?", help="the folder to work in; . for here"
    )
    parser.add_argument(
        "-x",
        "--experiment",
        metavar="NAME",
        action="append",
        default=[],
        help="also write this experiment; may be given several times; `all` for all of them",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="with -x: at a laptop's size, into pretrain/ekd/tiny/"
    )
    for name, there in CORPORA.items():
        parser.add_argument(f"--{name}", metavar="DIR", type=Path, help=f"the folder with {there}")
    parser.add_argument(
        "--lexicon",
        metavar="FILE",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="pronunciations for PR that need no preparation; s3prl's repository has such files",
    )
    parser.add_argument("--list", action="store_true", help="list the experiments and leave")


def main(args: argparse.Namespace) -> int:
    if args.list:
        for name, text in experiments().items():
            about = text.split("\n#\n")[0]  # its first comment
            print(f"{name}\n    {' '.join(line.lstrip('# ') for line in about.splitlines())}")
        return 0
    if args.dir is None:
        raise SetupError("name the folder to work in: s3prl-ekd init DIR (. for here)")
    if args.tiny and not args.experiment:
        raise SetupError("--tiny: name an experiment too, with -x NAME, or -x all")
    chosen = [_full_name(name, args.tiny) for name in args.experiment]
    if "all" in args.experiment:
        chosen = [name for name in experiments() if name.startswith("tiny/") or not args.tiny]
    named = (args.librispeech, args.voxceleb1, args.iemocap)
    librispeech, voxceleb1, iemocap = (path and absolute(path) for path in named)
    lexicon = [absolute(path) for path in args.lexicon]
    corpora = Corpora(librispeech, voxceleb1, iemocap, lexicon)
    corpora.check()  # before anything is written
    for state, path in write_workspace(args.dir, chosen, corpora.values()):
        print(f"{state:8} {path}")
    others = other_values(args.dir, corpora)
    if others:
        print("", *others, sep="\n")
    print(f"\n{_next(args.dir, corpora)}")
    return 0


def _full_name(name: str, tiny: bool) -> str:
    """``three_average`` -> ``experiments/three_average``, or ``tiny/three_average``."""
    folder, slash, old = name.rpartition("/")
    if old in RENAMED:
        name = f"{folder}{slash}{RENAMED[old]}"
        logger.warning(
            "experiment `%s` is now `%s`; the old name works until 0.3", old, RENAMED[old]
        )
    if tiny:
        return f"tiny/{name.removeprefix('experiments/').removeprefix('tiny/')}"
    return name if "/" in name else f"experiments/{name}"


def _next(folder: Path, corpora: Corpora) -> str:
    here = "" if folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(folder))}, then "
    run = "run_pretrain.py -u ekd -n my_student"
    if not corpora:
        what = "edit libri_root, file_path and sets in pretrain/ekd/config_runner.yaml and type:"
        return f"next: {here}{what}\n  {run}"
    lines = corpora.commands()
    if corpora.librispeech:
        lines += [run, "s3prl-ekd export student result/pretrain/my_student -o student.safetensors"]
    return "\n  ".join([f"next: {here}type:", *lines, "s3prl-ekd superb student.safetensors"])
