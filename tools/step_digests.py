"""Compare the first training steps of every experiment between two versions, bit for bit.

``write`` runs ``run_pretrain.py -u ekd`` for each YAML file of ``pretrain_configs/`` and for some
further settings. It writes every logged scalar, every loss on which ``backward`` is called, and a
SHA-256 of every gradient (before clipping) and of every weight (before and after each update).
``compare`` exits with 1 at the first value that differs. Neither imports s3prl_ekd: the commands
run in processes in which only torch is patched, so the tool works for versions with other modules.

Runs are reduced to 3 steps, batches of 4 utterances, excerpts of 1.5 s, float32 and
no loader workers except in the cases that test them. The teachers in config_model.yaml are the
files hubert.pt, robust_hubert.pt and wavlm.pt in TEACHERS, of any width and 12 layers in s3prl's
formats; the student has the same widths. Files of units are made by the commands in the comments of
the configs that need them, with 8 units. Layers, groups, dropout, distortions, losses and all else
are as shipped. Configs with the package's tiny teachers run at full size.

Write both files on the same machine, with the same torch and number of threads; other values may
differ otherwise. CORPUS has `unlabeled.tsv` (columns path, split) and `noise.tsv` (column path).

example, in the root of each checkout, with its Python:
  python -m tools.step_digests write before.json --corpus CORPUS --teachers TEACHERS
  python -m tools.step_digests write after.json --corpus CORPUS --teachers TEACHERS \\
      --configs FOLDER_OF_OLD_YAML
  python -m tools.step_digests compare before.json after.json
  python -m tools.step_digests compare before.json after.json --tolerance 1e-5
"""

from __future__ import annotations

import argparse
import atexit
import csv
import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

RUNNER = """\
runner: {total_steps: 3, log_step: 1, save_step: 1}
pretrain_expert:
  datarc: {libri_root: audio, file_path: tables, sets: [train], train_batch_size: 4, num_workers: 0,
    sequence_length: 24000}
"""
SIZES = ("extractor_conv_feature_layers", "conv_pos", "conv_pos_groups", "encoder_embed_dim")
SIZES += ("encoder_ffn_embed_dim", "encoder_attention_heads")
# Name -> settings over config_model.yaml (keys of version 0.1), and overrides for -o (DATA stands
# for config.pretrain_expert.datarc).
MORE = """\
workers: [{distortion: {setup: setup1}}, DATA.num_workers=2]
cache: [{aggregation: average}, DATA.target_cache='cache']
cache_workers: [{}, "DATA.target_cache='cache',,DATA.num_workers=1"]
s3prl_teachers: [{teacher_path: plain}]
units: [{aggregation: average, essence: {keep: 0.5, units: units.safetensors}}]
noise: [{distortion: {setup: setup2, noise: [noise], babble: true}}]
running: [{aggregation: concat, heads: {kind: linear},
  targets: {standardise: running, separate_heads: true, drop_teachers: 0.5}}]
across_teachers: [{aggregation: groups, targets: {across_teachers: true, weight_steps: 2},
  teachers: {hubert: {groups: [[1, 2], [5, 6, 7]]}, robust_hubert: {groups: [[4], [0, 8]]},
    wavlm: {groups: [[3], [11, 12]], final_weight: 0.0}}}]
loss: [{loss: {reconstruction: smooth_l1, cosine: raw, feature_penalty: 0.1},
  student: {encoder_layerdrop: 0.5, extractor_dropout: 0.1}}]
average_init: [{init: {teacher: null, average: [hubert, robust_hubert], layers: [0, 6]}}]
random_init: [{init: {teacher: null}, student: {extractor_mode: layer_norm}}]
pre_norm: [{student: {layer_norm_first: true, feature_grad_mult: 0.0}}]
accumulate: [{targets: {residual_heads: true}},
  "config.runner.gradient_accumulate_steps=2,,config.runner.recompute=True"]
dev_sets: [{}, "DATA.dev_sets=['dev'],,DATA.max_seconds=4"]
fused_adamw: [{}, config.optimizer.name='FusedAdamW']
"""
CASES = yaml.safe_load(MORE.replace("DATA", "config.pretrain_expert.datarc"))


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        0: written, or all values are equal. 1: a case failed, or a value differs. 2: wrong
        arguments.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("write", help="run the experiments").add_argument
    add("out", metavar="FILE.json", type=Path)
    add("--corpus", type=Path, required=True, help="corpus folder; 12 of its utterances are used")
    add(
        "--teachers",
        type=Path,
        required=True,
        help="folder with hubert.pt, robust_hubert.pt and wavlm.pt",
    )
    add("--configs", type=Path, help="a pretrain_configs/ (default: what `init -x all` writes)")
    add(
        "--only",
        metavar="NAME",
        nargs="+",
        help="run only these cases, such as experiments/skill or more/units",
    )
    add("--jobs", type=int, default=1, help="number of cases to run in parallel (1)")
    add = commands.add_parser("compare", help="find the first difference").add_argument
    add("files", metavar="FILE.json", type=Path, nargs=2)
    add(
        "--tolerance",
        type=float,
        metavar="X",
        help="compare losses and gradients of the first step only, by relative difference",
    )
    args = parser.parse_args(argv)
    if args.command == "compare":
        first, second = (json.loads(path.read_text()) for path in args.files)
        if args.tolerance is not None:
            return compare_first_step(first, second, args.tolerance)
        return compare(first, second)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return write(args, Path(folder))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1


def compare(first: dict[str, dict[str, str]], second: dict[str, dict[str, str]]) -> int:
    """Print the number of equal values, or the first difference; return the exit code."""
    count = 0
    for case in sorted({*first, *second}):
        a, b = first.get(case, {}), second.get(case, {})
        for key in {**a, **b}:  # in the order of the steps
            if a.get(key) != b.get(key):
                print(f"{case}: {key}: {a.get(key)} and {b.get(key)}, after {count} equal values")
                return 1
            count += 1
    print(f"{count} values are equal")
    return 0 if count else 1


def compare_first_step(
    first: dict[str, dict[str, str]], second: dict[str, dict[str, str]], tolerance: float
) -> int:
    """Print the largest relative difference in the first step; 1 if it is above ``tolerance``.

    Of a gradient, the difference is estimated from its norm and its product with a random vector,
    relative to its norm, or to a thousandth of the norm of all gradients if that is larger: the
    gradients of the keys' biases are zero except for rounding.
    """
    worst, count = (0.0, "", ""), 0
    for case in sorted(first.keys() & second.keys() - {"inputs"}):
        pairs = {}
        for key, text in first[case].items():
            other = second[case].get(key, "none")
            if text != "none" and (key == "loss 1" or key.startswith("update 1: gradient")):
                pairs[key] = [
                    [*map(float.fromhex, t.split("] ")[-1].split()[-2:])]
                    for t in (text, other)
                    if t != "none"
                ]
        norms = [a[0] for key, (a, *_) in pairs.items() if key != "loss 1"]
        least = sum(norm**2 for norm in norms) ** 0.5 / 1000
        for key, (a, *others) in pairs.items():
            size = abs(a[0]) if key == "loss 1" else max(a[0], least)
            b = others[0] if others else [float("inf")] * len(a)
            difference = max(abs(x - y) for x, y in zip(a, b, strict=True)) / size
            worst, count = max(worst, (difference, case, key)), count + 1
    print(f"{count} values; largest relative difference {worst[0]:.1e}: {worst[1]}: {worst[2]}")
    return 0 if count and worst[0] <= tolerance else 1


def write(args: argparse.Namespace, folder: Path) -> int:
    """Run the cases in ``folder`` and write their values; return the exit code.

    Raises:
        RuntimeError: another s3prl_ekd is imported, or preparing the inputs failed.
    """
    code = run(["-c", "import s3prl_ekd; print(s3prl_ekd.__file__)"], folder)
    if Path(__file__).resolve().parents[1] not in Path(code).resolve().parents:
        raise RuntimeError(f"{sys.executable} imports another s3prl_ekd: {code}")
    results = {"inputs": prepare(folder, args)}
    configs = folder / "pretrain/ekd"
    for name, (settings, *_) in CASES.items():
        merge_yaml(configs / f"more/{name}.yaml", {"extends": "../config_model.yaml", **settings})
    names = [str(path.relative_to(configs).with_suffix("")) for path in configs.rglob("*.yaml")]
    names = sorted(name for name in names if "runner" not in name)
    cases = [name for name in names if name in (args.only or names)]
    if len(cases) < len(args.only or []):
        print(f"--only: no such case; the cases are {', '.join(names)}", file=sys.stderr)
        return 2
    if not args.only or any("cache" in name or "units" in name for name in cases):
        model, runner = "pretrain/ekd/config_model.yaml", "pretrain/ekd/config_runner.yaml"
        run(["-m", "s3prl_ekd", "cache", "-c", runner, "-g", model, "-o", "cache"], folder)
        data = ["--data", "tables/train.csv", "--audio-root", "audio"]
        more = ["--teacher", "hubert", "--layer", "6", "--clusters", "8", "-o", "units.safetensors"]
        run(["-m", "s3prl_ekd", "units", model, *data, *more], folder)
    for name in cases:
        fit_units_of(configs / f"{name}.yaml", folder)
    failed = []

    def run_and_report(name: str) -> None:
        try:
            results[name] = run_case(name, folder)
            print(f"{name}: {len(results[name])} values", flush=True)
        except RuntimeError as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run_and_report, cases))
    args.out.write_text(json.dumps(dict(sorted(results.items())), indent=0))
    print(f"{sum(map(len, results.values()))} values of {len(cases)} cases -> {args.out}")
    return 1 if failed else 0


def prepare(folder: Path, args: argparse.Namespace) -> dict[str, str]:
    """Write the configs, corpus and length tables; return the SHA-256 of each input file."""
    import soundfile
    import torch

    run(["-m", "s3prl_ekd", "init", str(folder), "-x", "all"], folder)
    configs = folder / "pretrain/ekd"
    if args.configs:
        for path in configs.rglob("*.yaml"):
            path.unlink()
        ignored = shutil.ignore_patterns("*.py", "__pycache__")
        shutil.copytree(args.configs, configs, dirs_exist_ok=True, ignore=ignored)
    for path in configs.glob("*runner.yaml"):
        old = "precision" not in yaml.safe_load(path.read_text())["runner"]
        merge_yaml(path, yaml.safe_load(RUNNER))
        merge_yaml(path, {"runner": {"fp16": False} if old else {"precision": "float32"}})
    path = configs / "config_model.yaml"
    names = list(yaml.safe_load(path.read_text())["teachers"])
    files = {name: (args.teachers / f"{name}.pt").resolve() for name in names}
    sizes = torch.load(files["hubert"], weights_only=True)["model_cfg"]
    merge_yaml(path, {"teachers": {name: {"model": str(file)} for name, file in files.items()}})
    merge_yaml(path, {"student": {key: sizes[key.removeprefix("extractor_")] for key in SIZES}})

    rows = read_tsv(args.corpus / "unlabeled.tsv")
    paths = [row["path"] for row in rows if row["split"] == "train"]
    noise = [row["path"] for row in read_tsv(args.corpus / "noise.tsv")]
    copied = [("audio", path) for path in paths[:: max(1, len(paths) // 12)][:12]]
    copied += [("noise", path) for path in noise[:: max(1, len(noise) // 3)][:3]]
    (folder / "tables").mkdir()
    tables = {name: [",file_path,length,label"] for name in ("train", "dev")}
    for number, (kind, name) in enumerate(copied):
        copy = folder / kind / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(args.corpus / name, copy)
        files[f"{kind}/{name}"] = copy
        if kind == "audio":
            table = tables["train" if number < 10 else "dev"]
            table.append(f"{len(table) - 1},{name},{soundfile.info(copy).frames},")
    for name, lines in tables.items():
        (folder / f"tables/{name}.csv").write_text("\n".join(lines) + "\n")
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def fit_units_of(config: Path, folder: Path) -> None:
    """Make the files of units that an experiment needs, as its comment says, with 8 units each."""
    text = re.sub(r" \\\n#\s+", " ", config.read_text())
    for command in re.findall(r"^# +s3prl-ekd (fit-units .*)", text, re.MULTILINE):
        argv = shlex.split(command)
        for option, value in {"--data": "tables/train.csv", "--clusters": "8"}.items():
            argv[argv.index(option) + 1] = value
        if not (folder / argv[argv.index("-o") + 1]).exists():
            run(["-m", "s3prl_ekd", *argv, "--audio-root", "audio"], folder)


def merge_yaml(path: Path, settings: dict) -> None:
    """Merge ``settings`` into a YAML file, recursively."""

    def merge(base: dict, over: dict) -> dict:
        for key, value in over.items():
            nested = isinstance(value, dict) and isinstance(base.get(key), dict)
            base[key] = merge(base[key], value) if nested else value
        return base

    path.parent.mkdir(exist_ok=True)
    base = yaml.safe_load(path.read_text()) if path.exists() else {}
    path.write_text(yaml.safe_dump(merge(base, settings), sort_keys=False))


def read_tsv(path: Path) -> list[dict[str, str]]:
    """Rows of a tab-separated table with a header and without quoting."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def run(argv: list[str], folder: Path) -> str:
    """Run Python in ``folder`` on one thread and return its output.

    Raises:
        RuntimeError: the exit code is not 0; with the end of the output.
    """
    result = subprocess.run(
        [sys.executable, *argv],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    if result.returncode:
        raise RuntimeError(f"exit code {result.returncode}\n{result.stdout[-3000:]}")
    return result.stdout.strip()


def run_case(name: str, folder: Path) -> dict[str, str]:
    """Train one experiment; return its values by names such as ``update 1: gradient 0``.

    Raises:
        RuntimeError: the command failed, or did not take 3 optimizer steps.
    """
    record = folder / f"{name.replace('/', '.')}.json"
    argv = [str(Path(__file__).resolve()), "watch", str(record), "run_pretrain.py", "-u", "ekd"]
    tiny = name.startswith("tiny")
    runner = "tiny_runner" if tiny else "config_runner"
    if "pruning" in yaml.safe_load((folder / f"pretrain/ekd/{name}.yaml").read_text()):
        runner = "tiny_pruning_runner" if tiny else "pruning_runner"
    argv += ["-c", f"pretrain/ekd/{runner}.yaml", "-g", f"pretrain/ekd/{name}.yaml"]
    for override in CASES.get(name.removeprefix("more/"), [{}])[1:]:
        argv += ["-o", override]
    run([*argv, "-n", name, "--device", "cpu"], folder)
    values = json.loads(record.read_text())
    if "update 3: gradient 0" not in values or "update 4: gradient 0" in values:
        raise RuntimeError("expected 3 optimizer steps, got fewer or more")
    return {**read_scalars(folder / "result/pretrain" / name), **values}


def read_scalars(folder: Path) -> dict[str, str]:
    """Read a run's TensorBoard scalars as hexadecimal floats."""
    from tensorboardX.proto.event_pb2 import Event

    values = {}
    for path in sorted(folder.glob("*events*")):
        data, offset = path.read_bytes(), 0
        while offset < len(data):  # length, its checksum, event, its checksum
            (size,) = struct.unpack_from("<Q", data, offset)
            event = Event.FromString(data[offset + 12 : offset + 12 + size])
            offset += size + 16
            for value in event.summary.value:
                values[f"step {event.step}: {value.tag}"] = value.simple_value.hex()
    return values


def watch(out: str) -> None:
    """Patch torch to record losses, gradients and weights, and write them to ``out`` at exit."""
    import torch

    values: dict[str, str] = {}
    weights: list[torch.Tensor] = []
    counts = {"loss": 0, "update": 0}
    backward, clip, process = torch.Tensor.backward, torch.nn.utils.clip_grad_norm_, os.getpid()

    def record(name: str, tensors: list[torch.Tensor | None]) -> None:
        """Record tensors, sorted by shape and norm, so that names and order of parameters do not
        count."""
        digests = sorted(describe(tensor) for tensor in tensors if tensor is not None)
        digests += [(0, 0.0, "none")] * sum(tensor is None for tensor in tensors)
        values.update({f"{name} {i}": text for i, (*_, text) in enumerate(digests)})

    def describe(tensor: torch.Tensor) -> tuple[list[int], float, str]:
        """Shape, norm, and a text of shape, SHA-256, norm, and product with a random vector."""
        tensor = tensor.detach().contiguous()
        digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:24]
        flat = tensor.double().flatten()
        vector = torch.randn(len(flat), generator=torch.Generator().manual_seed(0)).double()
        norm, product = float(flat.norm()), float(flat @ vector)
        return [*tensor.shape], norm, f"{[*tensor.shape]} {digest} {norm.hex()} {product.hex()}"

    def watched_backward(self, *args, **kwargs):
        counts["loss"] += 1
        values[f"loss {counts['loss']}"] = self.item().hex()
        return backward(self, *args, **kwargs)

    def watched_clip(parameters, *args, **kwargs):
        weights[:] = parameters
        counts["update"] += 1
        record(f"update {counts['update']}: weight before", weights)
        record(f"update {counts['update']}: gradient", [weight.grad for weight in weights])
        return clip(weights, *args, **kwargs)

    def finish() -> None:
        if os.getpid() == process:
            record("weight at the end", weights)
            Path(out).write_text(json.dumps(values))

    torch.Tensor.backward = watched_backward
    torch.nn.utils.clip_grad_norm_ = torch.nn.utils.clip_grad.clip_grad_norm_ = watched_clip
    atexit.register(finish)


if __name__ == "__main__":
    if sys.argv[1:2] != ["watch"]:
        raise SystemExit(main())
    sys.path.pop(0)  # this folder
    watch(sys.argv[2])
    del sys.argv[1:3]
    runpy.run_module("s3prl_ekd", run_name="__main__", alter_sys=True)
