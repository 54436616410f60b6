"""Export a student as a HubertModel for transformers.

DIR gets config.json, model.safetensors, preprocessor_config.json and README.md, a model card that
explains how its hidden states correspond to the student's. The model is loaded again and compared
with the student on a padded batch; if they differ, DIR is not written.

example:
  s3prl-ekd export hf student.safetensors -o my_student_hf
"""

from __future__ import annotations

import argparse

from . import load_checkpoint


def configure(parser: argparse.ArgumentParser) -> None:
    """``export hf`` has no further options."""


def main(args: argparse.Namespace) -> int:
    """Write the folder; return exit code 0."""
    from ...export.folder import export_folder
    from ...export.huggingface import FILES, TOLERANCE, check_hf_export, save_hubert, to_hubert
    from ...export.model_card import hf_card

    path, loaded = load_checkpoint(args.checkpoint)
    with export_folder(args.output, args.force, FILES) as folder:
        model = to_hubert(loaded.student)
        save_hubert(model, folder)
        error = check_hf_export(folder, loaded.student)
        count = sum(parameter.numel() for parameter in model.parameters())
        card = hf_card(loaded, args.output.resolve().name, count, error, TOLERANCE)
        (folder / "README.md").write_text(card, encoding="utf-8")
        size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{path} -> {args.output} ({size / 1e6:.1f} MB)")
    print(f"{count:,} parameters, without prediction heads")
    print(f"largest difference from the student's hidden states on a padded batch: {error:.1e}")
    print(f"next: transformers.AutoModel.from_pretrained({str(args.output)!r})")
    return 0
