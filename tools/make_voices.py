"""Synthesise the speech of many voices that the tiny teachers are trained on beside real speech.

OUT/train-clean is a folder for tools/train_tiny_teachers.py; OUT also gets two more voices with 50
utterances (dev-clean), transcripts, length tables and noise, as the demo's corpus has them. The
same options give the same bytes; the defaults are what the package's teachers heard. The demo's
voices are others, for its seed is 1337. Needs the extra demo.

example:
  python tools/make_voices.py voices --voices 48 --utterances 1200 --seed 8
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from s3prl_ekd.demo.corpus import make_corpus
from s3prl_ekd.errors import EkdError

DEV_VOICES, DEV_UTTERANCES = 2, 50


def main(argv: list[str] | None = None) -> int:
    """0: the corpus is there; 2: a mistake, in a sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", metavar="OUT", type=Path, help="folder to make; one that is whole is kept")
    add("--voices", type=int, default=48, help="of train-clean (%(default)s)")
    add("--utterances", type=int, default=1200, help="of train-clean (%(default)s)")
    add("--seed", type=int, default=8, help="of voices, sentences and noise (%(default)s)")
    args = parser.parse_args(argv)
    try:
        record = make_corpus(
            args.out,
            seed=args.seed,
            speakers={"train-clean": args.voices, "dev-clean": DEV_VOICES},
            utterances={"train-clean": args.utterances, "dev-clean": DEV_UTTERANCES},
        )
    except EkdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    train = record["splits"]["train-clean"]
    print(
        f"{args.out / 'train-clean'}: {train['utterances']} utterances, "
        f"{train['seconds'] / 3600:.2f} h, {len(train['speakers'])} voices"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
