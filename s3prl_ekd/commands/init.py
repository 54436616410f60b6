"""Set up a working folder: write pretrain/ekd/ and downstream/, which s3prl reads.

Prints `created` or `kept` for each file. Existing files are never overwritten, so the command can
be repeated, also in a checkout of s3prl. The default experiment is always written; -x adds others.
Corpus paths are checked and inserted into the configs and recipes.

example:
  s3prl-ekd init my_work && cd my_work
  s3prl-ekd init my_work --librispeech /data/LibriSpeech --voxceleb1 /data/VoxCeleb1 \\
      --iemocap /data/IEMOCAP_full_release
  s3prl-ekd init . -x three_average --tiny
  s3prl-ekd init --list
"""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..downstream.tasks import DEFAULT_TASKS
from ..errors import SetupError
from ..files.renamed_keys import renamed_text
from ..workspace import (
    CorpusPaths,
    Experiment,
    absolute_path,
    experiments,
    report_differences,
    write_workspace,
)

logger = logging.getLogger(__name__)

# Old names of experiments, from version 0.1.
RENAMED = {"reference": "s3prl_distiller", "three_standardised": "three_phi_s"}

CORPORA = {
    "librispeech": "train-clean-100/, dev-clean/, test-clean/",
    "voxceleb1": "dev/wav/ and test/wav/",
    "iemocap": "Session1/ to Session5/",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dir", metavar="DIR", type=Path, nargs="?", help="the working folder; . for this folder"
    )
    parser.add_argument(
        "-x",
        "--experiment",
        metavar="NAME",
        action="append",
        default=[],
        help="also write this experiment; can be repeated; `all` for all of them",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="with -x: write tiny versions to pretrain/ekd/tiny/"
    )
    for name, contents in CORPORA.items():
        parser.add_argument(
            f"--{name}", metavar="DIR", type=Path, help=f"the folder that contains {contents}"
        )
    parser.add_argument(
        "--lexicon",
        metavar="FILE",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="pronunciations for PR, such as downstream/ctc/lexicon/*.txt in s3prl's repository",
    )
    parser.add_argument("--list", action="store_true", help="list the experiments and exit")


def main(args: argparse.Namespace) -> int:
    if args.list:
        for name, text in experiments().items():
            comment = text.split("\n#\n")[0]
            print(f"{name}\n    {' '.join(line.lstrip('# ') for line in comment.splitlines())}")
        return 0
    if args.dir is None:
        raise SetupError("expected a working folder; type: s3prl-ekd init DIR (. for this folder)")
    if args.tiny and not args.experiment:
        raise SetupError("--tiny needs an experiment; add -x NAME, or -x all")
    for old, new in RENAMED.items():
        if old in {name.rpartition("/")[2] for name in args.experiment}:
            logger.warning("experiment %s", renamed_text(old, new))
    selected = [_full_name(name, args.tiny) for name in args.experiment]
    if "all" in args.experiment:
        selected = [name for name in experiments() if name.startswith("tiny/") or not args.tiny]
    folders = (args.librispeech, args.voxceleb1, args.iemocap)
    librispeech, voxceleb1, iemocap = (path and absolute_path(path) for path in folders)
    lexicon = [absolute_path(path) for path in args.lexicon]
    corpora = CorpusPaths(librispeech, voxceleb1, iemocap, lexicon)
    corpora.check()  # before anything is written
    for state, path in write_workspace(args.dir, selected, corpora.values()):
        print(f"{state:8} {path}")
    differences = report_differences(args.dir, corpora.values())
    if differences:
        print("", *differences, sep="\n")
    chosen = [] if "all" in args.experiment else selected
    texts = experiments()
    steps = _next_steps(args.dir, corpora, [Experiment(name, texts[name]) for name in chosen])
    print(f"\n{steps}")
    return 0


def _full_name(name: str, tiny: bool) -> str:
    """``three_average`` -> ``experiments/three_average``, or ``tiny/three_average``."""
    folder, slash, base = name.rpartition("/")
    name = f"{folder}{slash}{RENAMED.get(base, base)}"
    if tiny:
        return f"tiny/{name.removeprefix('experiments/').removeprefix('tiny/')}"
    return name if "/" in name else f"experiments/{name}"


def _next_steps(folder: Path, corpora: CorpusPaths, chosen: Sequence[Experiment] = ()) -> str:
    """The commands to type next, for the chosen experiments or the default one."""
    cd = "" if folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(folder))}, then "
    runs = [" ".join(experiment.run()) for experiment in chosen]
    after = [experiment.after() for experiment in chosen]
    students = [f"{e.run_name}.safetensors" for e in chosen if not e.is_pruned]
    if not chosen:
        runs, students = ["run_pretrain.py -u ekd -n my_student"], ["student.safetensors"]
        after = ["s3prl-ekd export student result/pretrain/my_student -o student.safetensors"]
    if not corpora:
        runners = sorted({f"pretrain/ekd/{e.runner}.yaml" for e in chosen})
        files = " and ".join(runners or ["pretrain/ekd/config_runner.yaml"])
        edit = f"edit libri_root, file_path and sets in {files} and type:"
        return "\n  ".join([f"next: {cd}{edit}", *runs])
    lines = corpora.commands()
    if corpora.librispeech:
        lines += [line for pair in zip(runs, after, strict=True) for line in pair]
    if corpora.tasks and students:
        tasks = corpora.tasks
        names = "" if len(tasks) == len(DEFAULT_TASKS) else f" --tasks {' '.join(tasks)}"
        lines.append(f"s3prl-ekd superb {' '.join(students)}{names}")
    phones = ""
    if corpora.librispeech and not corpora.lexicon:
        phones = (
            "\nPR needs a lexicon, too: add --lexicon cmudict.dict --g2p to prepare librispeech"
        )
    return "\n  ".join([f"next: {cd}type:", *lines]) + phones
