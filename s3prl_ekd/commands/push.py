"""Upload a student to the Hugging Face Hub, as the folder that `export hf` writes.

The model is compared with the student before anything is uploaded. Its card names the license, the
teachers that are on the Hub (base_model), data and language (those of LibriSpeech if the run's
length tables have the names of its parts), and the results of `s3prl-ekd superb` on this student,
which are recognised by the contents of the file.

Everything that will be uploaded is printed first. With --dry-run, or if HF_HUB_OFFLINE is set,
nothing is uploaded. Log in before with: hf auth login. An existing repository gets a new commit.

example:
  s3prl-ekd push student.safetensors my-org/my-student --license apache-2.0 --dry-run
  s3prl-ekd push student.safetensors my-org/my-student --license apache-2.0 --private
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError, SetupError
from ..files.hub import is_offline, parse_repository
from ..teachers.student_source import check_student
from .export import add_checkpoint, load_checkpoint

if TYPE_CHECKING:
    from ..superb.metrics import TaskMetric
    from ..teachers.student_source import StudentSource

RESULTS = Path("result/superb")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``push``."""
    add_checkpoint(parser)
    add = parser.add_argument
    add("repository", metavar="ORG/NAME", help="the model on the Hub; created if it does not exist")
    add("--license", metavar="ID", help="such as apache-2.0; needed for an upload")
    add(
        "--dataset", metavar="ID", action="append", default=[],
        help="training data on the Hub, such as openslr/librispeech_asr",
    )  # fmt: skip
    add("--language", metavar="CODE", action="append", default=[], help="such as en")
    add(
        "--results", metavar="DIR", type=Path,
        help=f"folder that superb wrote (default: {RESULTS}, if it exists)",
    )  # fmt: skip
    add("--private", action="store_true", help="make a new repository private")
    add("--dry-run", action="store_true", help="print what would be uploaded")


def main(args: argparse.Namespace) -> int:
    """Print the upload, and make it unless this is a dry run; return exit code 0."""
    repo = parse_repository(args.repository)
    if repo is None:
        raise SetupError(
            f"expected ORG/NAME, your user name or organisation and the model's name, such as "
            f"my-org/my-student; got {args.repository!r}"
        )
    dry_run = "--dry-run" if args.dry_run else "HF_HUB_OFFLINE is set" if is_offline() else ""
    if not (args.license or dry_run):
        raise SetupError(
            "--license is missing: add the license under which you publish the student, such as "
            "--license apache-2.0 (see those of its teachers), or --dry-run"
        )
    check_student(args.checkpoint)

    from ..export.card_data import CardFacts
    from ..export.huggingface import FILES, write_hf_folder
    from ..export.push import Upload, require_login
    from ..student_file import require_cut

    if not dry_run:
        require_login()
    # checks the values
    facts = CardFacts(args.license, tuple(args.dataset), tuple(args.language), repository=repo)
    source, loaded = load_checkpoint(args.checkpoint)
    require_cut(loaded.student, source.path)
    facts = dataclasses.replace(facts, metrics=_metrics(args.results, source))
    with tempfile.TemporaryDirectory(prefix="ekd_push_") as temporary:
        folder = Path(temporary)
        count, error = write_hf_folder(loaded, folder, repo.partition("/")[2], facts)
        print(f"{source}: {count:,} parameters, without prediction heads")
        print(f"largest difference from the student's hidden states: {error:.1e}")
        upload = Upload(repo, folder, FILES, args.private)
        print("\n".join(upload.describe()))
        print(f"\nREADME.md:\n{(folder / 'README.md').read_text(encoding='utf-8')}")
        if dry_run:
            print(f"dry run ({dry_run}): nothing was uploaded")
            if not args.license:
                print("next: add --license, such as --license apache-2.0")
            return 0
        print(f"uploaded: {upload.run()}")
    print(f"next: transformers.AutoModel.from_pretrained({repo!r})")
    return 0


def _metrics(results: Path | None, source: StudentSource) -> dict[str, TaskMetric]:
    """The student's results, from a given folder or the default one; prints why there are none.

    Raises:
        SetupError: the given folder has none.
        DataError: it cannot be read; see :func:`.student_results`.
    """
    folder = RESULTS if results is None else results
    if results is None and not folder.is_dir():
        return {}

    from ..superb.student_results import student_results

    try:
        found = student_results([folder], source.name)
    except DataError as error:
        if results is not None:
            raise
        print(f"the card has no scores: {error}")
        return {}
    if found.metrics:
        return found.metrics
    names = ", ".join(found.others) or "none that are finished"
    reason = (
        f"{folder} has no results of this student (by the contents of the file, with "
        f"hidden_states; upstreams there: {names})"
    )
    if results is not None:
        raise SetupError(f"{reason}; give the file that superb evaluated, or leave out --results")
    print(f"{reason}, so the card has no scores")
    return {}
