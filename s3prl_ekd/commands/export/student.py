"""Export a trained student to a single file of tensors and settings, without training state.

A student with gates keeps them; `s3prl-ekd prune` writes it without.

`run_downstream.py -u ekd_student -k FILE` loads it. FILE.safetensors is written in safetensors
format: loading it runs no code, with any version of torch. Any other name, such as FILE.pt, is
written by torch.save and loads with `weights_only=True`.

CKPT may also be a Hugging Face folder, or a model on the Hub: of `export hf`, DistilHuBERT, or a
HuBERT or WavLM with the layout of the Base or Large models, which becomes a copied student.

example:
  s3prl-ekd export student result/pretrain/my_student/states-10000.ckpt -o student.safetensors
  s3prl-ekd export student my_student_hf -o student.safetensors
"""

from __future__ import annotations

import argparse
import shlex

from . import add_heads, check_output, heads_text, load_checkpoint


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``export student``."""
    add_heads(parser, "the prediction heads; -s hidden_states_and_heads needs them")


def main(args: argparse.Namespace) -> int:
    """Write the file; return exit code 0."""
    from ...student_file import write_student

    check_output(args.output, args.force)
    source, loaded = load_checkpoint(args.checkpoint)
    heads = loaded.heads if args.heads == "keep" else None
    write_student(loaded, args.output, keep_heads=heads is not None)
    count = sum(p.numel() for p in loaded.student.parameters())
    if heads is not None:
        count += sum(p.numel() for p in heads.parameters())
    step = loaded.about.get("step")
    print(f"{source}{f' (step {step})' if step is not None else ''} -> {args.output}")
    print(f"{count:,} parameters, {heads_text(loaded, heads is not None)}")
    path = shlex.quote(str(args.output))
    print(f"next: run_downstream.py -m train -u ekd_student -k {path} -d asr -n my_asr")
    return 0
