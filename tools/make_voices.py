"""Synthesise the part of the tiny teachers' training data that is not real speech.

OUT/train-clean is an input of tools/train_tiny_teachers.py. OUT also gets 50 utterances of two
other voices (dev-clean), transcripts, length tables and noise, as in the demo's corpus. The same
options give the same bytes; the defaults give the training data of the package's teachers. The demo
has other voices, since its seed is 1337. Needs the extra demo.

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
    """Run the command; return 0, or 2 for a user's error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", metavar="OUT", type=Path, help="folder to write; if it is complete, nothing is done")
    add("--voices", type=int, default=48, help="voices in train-clean (%(default)s)")
    add("--utterances", type=int, default=1200, help="utterances in train-clean (%(default)s)")
    add("--seed", type=int, default=8, help="seed of voices, sentences and noise (%(default)s)")
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
