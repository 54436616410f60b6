"""Write a student as a folder for transformers: a HubertModel.

The folder holds config.json, model.safetensors, preprocessor_config.json and a model card
(README.md). It is loaded again and compared with the student, padded rows included, before it gets
its name. The card says which hidden states are the student's.

example:
  s3prl-ekd export hf student.safetensors -o my_student_hf
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .student import add_checkpoint, load


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``export hf``."""
    add_checkpoint(parser)
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="replace an existing model folder")


def main(args: argparse.Namespace) -> int:
    """Write the folder; the exit code is 0."""
    from ...export.folder import whole_folder
    from ...export.huggingface import FILES, TOLERANCE, check_folder, save_hubert, to_hubert
    from ...export.model_card import model_card

    path, loaded = load(args.checkpoint)
    with whole_folder(args.output, args.force, FILES) as folder:
        model = to_hubert(loaded.student)
        save_hubert(model, folder)
        error = check_folder(folder, loaded.student)
        count = sum(parameter.numel() for parameter in model.parameters())
        card = model_card(loaded, args.output.resolve().name, count, error, TOLERANCE)
        (folder / "README.md").write_text(card, encoding="utf-8")
        size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{path} -> {args.output} ({size / 1e6:.1f} MB)")
    print(f"{count:,} parameters, prediction heads left out")
    print(f"hidden states equal the student's: largest difference {error:.1e} on a padded batch")
    print(f"next: transformers.AutoModel.from_pretrained({str(args.output)!r})")
    return 0
