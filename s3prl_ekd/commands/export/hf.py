"""Export a student as a HubertModel or WavLMModel for transformers.

DIR gets config.json, model.safetensors, preprocessor_config.json and README.md, a model card that
explains how its hidden states correspond to the student's. The model is loaded again and compared
with the student on a padded batch; if they differ, DIR is not written.

transformers has no masked_norm. For such a student single utterances are compared; padded batches
differ. A student loaded from DIR has masked_norm: false.

A pruned student is padded with zeros to all heads, and to the units of its widest layer, because
transformers' layers are of one size.

example:
  s3prl-ekd export hf student.safetensors -o my_student_hf
"""

from __future__ import annotations

import argparse
import shlex

from . import load_checkpoint

_LOAD = "import sys, transformers; print(transformers.AutoModel.from_pretrained(sys.argv[1]))"


def configure(parser: argparse.ArgumentParser) -> None:
    """``export hf`` has no further options."""


def main(args: argparse.Namespace) -> int:
    """Write the folder; return exit code 0."""
    from ... import compat
    from ...distill.student_settings import PrunedSettings
    from ...export.card_data import CardFacts
    from ...export.folder import export_folder
    from ...export.huggingface import FILES, write_hf_folder
    from ...student_file import require_cut

    source, loaded = load_checkpoint(args.checkpoint)
    require_cut(loaded.student, source.path)
    student = loaded.student
    with export_folder(args.output, args.force, FILES) as folder:
        count, error = write_hf_folder(loaded, folder, args.output.resolve().name, CardFacts())
        size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{source} -> {args.output} ({size / 1e6:.1f} MB)")
    own = sum(parameter.numel() for parameter in student.parameters())
    padding = ""
    if isinstance(student.settings, PrunedSettings) and count > own:
        padding = f"; the student has {own:,}, the rest are zeros that make its layers of one size"
    print(f"{count:,} parameters, without prediction heads{padding}")
    if padding and count > 1.1 * own:
        print("where size matters, use export superb, export student or export onnx instead")
    masked = student.settings.masked_norm
    inputs = "single utterances" if masked else "a padded batch"
    print(f"largest difference from the student's hidden states on {inputs}: {error:.1e}")
    if masked:
        print(
            "transformers has no masked_norm, so this model's hidden states of padded batches "
            "differ from the student's; run utterances one by one"
        )
    if repair := compat.torchaudio_repair():
        print(f"transformers cannot import torchaudio here; before the next line, {repair}")
    print(f"next: python -c '{_LOAD}' {shlex.quote(str(args.output))}")
    return 0
