"""Probe frozen upstreams in closed form: what do their hidden states tell about phones, speakers,
emotions?

A quick look before days of SUPERB: no probe is trained by gradient descent, so a result has no
seed, and takes little longer than a forward pass over the corpus. MANIFEST is a tab-separated table
with the columns path and split, and one or more of these labels: segments (phones, from `s3prl-ekd
prepare alignments`), speaker, emotion. Phones are predicted by ridge regression on frames and on
means of segments, in five folds over speakers; speakers by linear discriminant analysis from
excerpts of one second, trained on the split train and tested on the split test; emotions likewise,
with one speaker left out at a time. All layers are used side by side. A kind of label is taken from
the first manifest that has it. With --noise, the tests are repeated under noise in a simulated
room, while the training stays clean. Intervals (95 %) are over other test utterances. Scores are
not comparable with those of SUPERB.

example:
  s3prl-ekd prepare alignments corpus/asr.tsv --lexicon cmudict.dict -o data/aligned
  s3prl-ekd probe student.safetensors hubert_base --data data/aligned/aligned.tsv corpus/sid.tsv
  s3prl-ekd probe tiny_hubert tiny_wavlm --data corpus/sid.tsv --noise noises --snr 5 -o probe
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SetupError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add(
        "upstreams", metavar="UPSTREAM", nargs="+",
        help="a student file, a name of s3prl's hub, NAME=FILE, NAME=HUB or NAME=HUB:CHECKPOINT",
    )  # fmt: skip
    add(
        "--data", metavar="MANIFEST", type=Path, nargs="+", action="extend", required=True,
        help="tables with labels, see above",
    )  # fmt: skip
    add(
        "--noise", metavar="DIR",
        help="also test under these noises: a folder of audio, or a manifest (test split)",
    )  # fmt: skip
    add("--snr", type=float, help="signal-to-noise ratio of --noise in dB (default: 5)")
    add("--no-room", action="store_true", help="noise only, without simulated rooms")
    add(
        "-o", "--output", metavar="FOLDER", type=Path,
        help="also write probe.md, probe.json and layers.png, a picture layer by layer",
    )  # fmt: skip
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if available)")


def main(args: argparse.Namespace) -> int:
    """Probe the upstreams and print a table; the exit code is 0."""
    from ..compat.source import may_be_upstream
    from ..probe.classifiers import require_lda
    from ..superb.plan import parse_upstream

    require_lda()
    if args.noise is None and (args.snr is not None or args.no_room):
        raise ConfigError("--snr and --no-room need --noise DIR")
    upstreams = [parse_upstream(text) for text in args.upstreams]
    names = [upstream.name for upstream in upstreams]
    if len(set(names)) < len(names):
        raise ConfigError("two upstreams have the same name; give one another with NAME=...")
    for upstream in upstreams:
        if not may_be_upstream(upstream.hub):
            raise SetupError(f"no such upstream in s3prl: {upstream.hub}; see run_downstream.py -h")

    import torch

    from ..files.atomic import atomic_file, write_text
    from ..files.report_file import check_beside, check_report
    from ..probe.conditions import NoisyCondition
    from ..probe.labels import read_labels
    from ..probe.measure import probe
    from ..probe.report import as_json, draw_layers, table
    from ..probe.tasks import ProbeTask, choose_tasks
    from ..superb.cost import build_upstream
    from ..system.devices import choose_device
    from ..system.tables import markdown_table, text_table

    device = choose_device(args.device)
    by_label: dict[str, ProbeTask] = {}
    for path in args.data:
        for task in choose_tasks(read_labels(path), partial(print, f"{path}:")):
            by_label.setdefault(task.label, task)
    noisy = None
    if args.noise is not None:
        from ..downstream.noise import find_noises

        snr = 5.0 if args.snr is None else args.snr
        name = f"{Path(args.noise).stem} {snr:g} dB" + ("" if args.no_room else " in a room")
        noisy = NoisyCondition(name, find_noises(args.noise), snr, not args.no_room)
    if args.output is not None:
        check_report(args.output / "probe.md", "| upstream |")
        check_beside(args.output / "probe.md", "probe.json", "layers.png")
    results = {}
    for upstream in upstreams:
        module: Any = build_upstream(upstream.hub, upstream.checkpoint).to(device)

        def states_of(wave: torch.Tensor, module=module, selection=upstream.selection):
            return [state[0] for state in module([wave.to(device)])[selection]]

        stride = module.get_downsample_rates(upstream.selection)
        results[upstream.name] = probe(
            states_of,
            list(by_label.values()),
            noisy,
            stride=stride,
            by_layer=args.output is not None,
            bar=upstream.name,
        )
    rows = table(results)
    print("accuracy in per cent, all layers side by side, with 95 % intervals over test utterances")
    print("\n".join(text_table(rows, rule=True)))
    if args.output is not None:
        write_text(args.output / "probe.md", markdown_table(rows) + "\n")
        write_text(args.output / "probe.json", as_json(results) + "\n")
        try:
            picture = draw_layers(results)
        except SetupError as error:
            print(f"no picture: {error}")
        else:
            with atomic_file(args.output / "layers.png") as file:
                file.write(picture)
        print(f"wrote {args.output}")
    return 0
