"""``python -m s3prl_ekd run_pretrain.py …`` (for torchrun), or any ``s3prl-ekd`` command."""

import sys


def main() -> int:
    from .launch import SCRIPTS

    if len(sys.argv) > 1 and sys.argv[1] in SCRIPTS:
        script = sys.argv.pop(1)
        return SCRIPTS[script]()
    from .cli import main as cli_main

    return cli_main()


if __name__ == "__main__":
    sys.exit(main())
