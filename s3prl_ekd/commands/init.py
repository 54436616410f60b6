"""Write what s3prl reads from the working folder: pretrain/ekd/ and downstream/.

Says `created` or `kept` for each file and never overwrites one, so it may be run again, also inside
a checkout of s3prl.

example:
  s3prl-ekd init my_experiment && cd my_experiment
"""

from __future__ import annotations

from pathlib import Path

from ..workspace import write_workspace


def configure(parser) -> None:
    parser.add_argument("dir", metavar="DIR", type=Path, help="the folder to work in; . for here")


def main(args) -> int:
    for state, path in write_workspace(args.dir):
        print(f"{state:8} {path}")
    here = "" if args.dir.resolve() == Path.cwd() else f"cd {args.dir}, then "
    print(
        f"\nnext: {here}edit libri_root, file_path and sets in pretrain/ekd/config_runner.yaml and "
        "type:\n  run_pretrain.py -u ekd -n my_student"
    )
    return 0
