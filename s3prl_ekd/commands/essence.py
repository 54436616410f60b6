"""Distil finished downstream models into one: Essence Knowledge Distillation.

The teachers are runs of `run_downstream.py -d asr` with any upstream. Their frame posteriors are
averaged and the essential classes selected. A new `-d asr` model on a frozen student is trained on
these and on the transcripts; its checkpoints have s3prl's format. With --alpha below 1, specaug's
time warp is turned off: it would shift the student's frames against the teachers'.

example:
  s3prl-ekd essence asr --teachers result/downstream/asr_hubert result/downstream/asr_wavlm \\
      --student-ckpt student.safetensors -c downstream/asr/tiny.yaml -n asr_essence --top-k 4
  run_downstream.py -m evaluate -t test-clean \\
      -e result/downstream/asr_essence/dev-clean-best.ckpt
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path

from ..errors import ConfigError, SetupError
from ..system import torchrun
from ..system.seeds import seed_number

logger = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the tasks, each with its options."""
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    asr = tasks.add_parser(
        "asr", help="distil models of -d asr",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = asr.add_argument
    add(
        "--teachers", metavar="CKPT", nargs="+", action="extend", required=True,
        help="checkpoints of -d asr, or run folders (dev-clean-best.ckpt, else the newest)",
    )  # fmt: skip
    add("--student-upstream", metavar="NAME", default="ekd_student", help="s3prl's -u")
    add("--student-ckpt", metavar="FILE", help="s3prl's -k: the student file")
    add("-c", "--config", metavar="YAML", help="default: downstream/asr/config.yaml")
    add("-n", "--expname", metavar="NAME", required=True, help="write to result/downstream/NAME")
    add("-o", "--override", metavar="TEXT", help="s3prl's -o: config.KEY.KEY=VALUE,,...")
    add("-a", "--auto_resume", action="store_true", help="resume from the newest checkpoint")
    rule = asr.add_argument_group("selection", "without these, the full posteriors are distilled")
    rule.add_argument("--top-k", metavar="K", type=int, help="keep the K most probable classes")
    rule.add_argument(
        "--mass", metavar="P", type=float, help="keep the fewest classes that reach probability P"
    )
    rule.add_argument(
        "--confidence", metavar="P", type=float, help="keep frames whose best class reaches P"
    )
    add(
        "--alpha", metavar="A", type=float, default=0.5,
        help="weight of the CTC loss; the teachers' loss has 1 - A (default: 0.5)",
    )  # fmt: skip
    add("--steps", metavar="N", type=int, help="overrides the YAML's runner.total_steps")
    add("--seed", metavar="N", type=seed_number, default=1337, help="(default: 1337, s3prl's)")
    add("--device", help="default: cuda if available")


def main(args: argparse.Namespace) -> int:
    """Check the request, load the teachers, train, print the next command."""
    if torchrun.is_distributed():
        raise SetupError("s3prl-ekd essence works in one process only; start it without torchrun")
    override = _override(args)

    # Paths, recipe and device are checked and completed as in run_downstream.py.
    from .. import launch
    from ..downstream.run import check_request
    from ..request import DownstreamRequest, escape_override

    request = check_request(
        DownstreamRequest(
            mode="train",
            downstream="asr",
            upstream=args.student_upstream,
            upstream_ckpt=args.student_ckpt,
            config=args.config,
            expname=args.expname,
            override=escape_override(override),
            device=args.device,
            seed=args.seed,
            auto_resume=args.auto_resume,
        )
    )
    _check_steps(args.config or "downstream/asr/config.yaml", override)

    from ..essence.asr import (
        AsrEnsemble,
        EssenceSettings,
        check_same_settings,
        checkpoint_in,
        distil_asr,
        load_asr_teacher,
    )
    from ..essence.selection import PosteriorSelection

    teachers = tuple(str(checkpoint_in(Path(path))) for path in args.teachers)
    try:
        selection = PosteriorSelection(args.top_k, args.mass, args.confidence)
        settings = EssenceSettings(teachers, selection, args.alpha)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if request.past_exp:
        check_same_settings(request.past_exp, settings)
    script = launch.import_script("run_downstream")
    ensemble = AsrEnsemble([load_asr_teacher(path) for path in teachers])
    sizes = (len(ensemble), selection, settings.alpha, len(ensemble.symbols))
    logger.info("essence: %d teachers, %s, alpha %g, %d classes", *sizes)
    try:
        distil_asr(script, request, ensemble, settings)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; add -a to the same command to resume", file=sys.stderr)
        return 130
    assert request.folder is not None  # of -n
    path = shlex.quote(str(checkpoint_in(request.folder)))
    print(f"\ndone; next:\n  run_downstream.py -m evaluate -t test-clean -e {path}")
    return 0


def _override(args: argparse.Namespace) -> str | None:
    if args.steps is None:
        return args.override
    if args.steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {args.steps}")
    steps = f"config.runner.total_steps={args.steps}"
    return f"{args.override},,{steps}" if args.override else steps


def _check_steps(path: str, override: str | None) -> None:
    """Check that the run evaluates and saves at least once; warn if not after its last step."""
    from ..files.config import apply_overrides, read_yaml

    config = read_yaml(path)
    runner = apply_overrides(config, override).get("runner")
    total = 0
    for name in ("total_steps", "eval_step", "save_step"):
        value = runner.get(name) if isinstance(runner, dict) else None
        if type(value) is not int or value < 1:
            raise ConfigError(
                f"{path}: runner.{name} must be an integer of at least 1, got {value!r:.60}"
            )
        total = total or value
        if value > total:
            raise ConfigError(
                f"{path}: runner.{name} ({value}) is above runner.total_steps ({total}), so no "
                f'checkpoint would be saved; add -o "config.runner.{name}={total}"'
            )
        if total % value:
            text = (
                "runner.%s (%d) does not divide total_steps (%d): the last %d steps are not saved"
            )
            logger.warning(text, name, value, total, total % value)
