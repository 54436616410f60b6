"""Write what s3prl reads from the working folder: pretrain/ekd/ and downstream/.

Says `created` or `kept` for each file and never overwrites one, so it may be run again, also inside
a checkout of s3prl. The default experiment is always written, others when they are named.

example:
  s3prl-ekd init my_work && cd my_work
  s3prl-ekd init . -x experiments/three_average -x tiny/three_average
  s3prl-ekd init --list
"""

from __future__ import annotations

from pathlib import Path

from ..errors import SetupError
from ..workspace import experiments, write_workspace


def configure(parser) -> None:
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
    parser.add_argument("--list", action="store_true", help="list the experiments and leave")


def main(args) -> int:
    if args.list:
        for name, about in experiments().items():
            print(f"{name}\n    {about}")
        return 0
    if args.dir is None:
        raise SetupError("name the folder to work in: s3prl-ekd init DIR (. for here)")
    chosen = list(experiments()) if "all" in args.experiment else args.experiment
    for state, path in write_workspace(args.dir, chosen):
        print(f"{state:8} {path}")
    here = "" if args.dir.resolve() == Path.cwd() else f"cd {args.dir}, then "
    print(
        f"\nnext: {here}edit libri_root, file_path and sets in pretrain/ekd/config_runner.yaml and "
        "type:\n  run_pretrain.py -u ekd -n my_student"
    )
    return 0
