"""Find groups of layers to distil, by clustering each teacher's layers (SKILL, arXiv 2402.16830).

Listens to some utterances, measures how alike all transformer layers of a teacher are, clusters
them hierarchically and writes a copy of CONFIG in which each teacher has `groups` instead of
`layers`: the target of a group is the average of its layers. The
dendrograms go beside it as PNG. Paper: groups by hierarchical clustering of layer similarities.
Ours, as the paper leaves open at hand: linear CKA, average linkage on 1 - CKA, three groups.

example:
  s3prl-ekd layers pretrain/ekd/config_model.yaml --data /data/LibriSpeech \\
      -o pretrain/ekd/skill.yaml
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path

import yaml

from ..errors import ConfigError, SetupError
from ..files.atomic import write_text


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    from ..analysis.choice import add_sample_options
    from ..analysis.layers import LINKAGES, SIMILARITIES

    parser.add_argument("config", metavar="CONFIG", type=Path, help="a model config, for -g")
    add_sample_options(parser)
    parser.add_argument("-o", "--output", metavar="NEW_CONFIG", type=Path, required=True)
    parser.add_argument(
        "--groups", metavar="K", type=int, default=3, help="groups a teacher (default: 3; ours)"
    )
    parser.add_argument(
        "--similarity",
        choices=tuple(SIMILARITIES),
        default="cka",
        help="linear CKA, or the mean cosine of frames (default: cka; ours)",
    )
    parser.add_argument(
        "--linkage", choices=LINKAGES, default="average", help="(default: average; ours)"
    )
    parser.add_argument(
        "--contiguous", action="store_true", help="only neighbouring layers may form a group (ours)"
    )
    parser.add_argument("--force", action="store_true", help="write over an existing NEW_CONFIG")


def main(args: argparse.Namespace) -> int:
    """Listen, cluster, write; see the module's text."""
    from ..analysis.choice import choose_audio
    from ..analysis.layers import cut, layer_tree, require_scipy, similarity_matrix
    from ..analysis.plots import plot_trees, require_matplotlib
    from ..analysis.sample import load_all, sample_layers
    from ..pretrain.settings import load_model_config

    require_scipy()  # before minutes of listening
    require_matplotlib()
    picture = args.output.with_suffix(".png")
    if picture == args.output:
        raise ConfigError(f"-o {args.output}: the config is YAML, the picture goes beside it")
    for path in (args.output, picture):
        if path.exists() and not args.force:
            raise ConfigError(f"{path} exists; add --force to write over it")
    settings = load_model_config(args.config).teachers
    paths = choose_audio(args.data, args.audio_root, args.utterances, args.seed)
    sample = sample_layers(load_all(settings, args.device), paths)

    trees, groups = {}, {}
    for name, layers in sample.items():
        if not 1 <= args.groups <= len(layers) - 1:
            raise ConfigError(
                f"--groups {args.groups}: {name} has {len(layers) - 1} transformer layers"
            )
        # Layer 0 is no transformer layer's output: it stays out of the groups (ours).
        similarity = similarity_matrix(layers[1:], args.similarity).numpy()
        trees[name] = layer_tree(similarity, args.linkage, args.contiguous)
        groups[name] = cut(trees[name], args.groups)
        print(f"{name}: " + "  ".join(str(list(group)) for group in groups[name]))

    how = f"{args.similarity}, {args.linkage} linkage{', contiguous' if args.contiguous else ''}"
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        text = grouped_config(args.config, groups, f"{how}, {len(paths)} utterances")
        write_text(args.output, text)
        label = f"1 - {args.similarity} ({args.linkage} linkage)"
        plot_trees(trees, groups, label, picture)
    except OSError as error:
        raise SetupError(f"cannot write {args.output}: {error.strerror}") from None
    print(f"wrote {args.output} and {picture}")
    print(f"next: run_pretrain.py -u ekd -g {shlex.quote(str(args.output))} -n my_student")
    return 0


def grouped_config(
    config: Path, groups: Mapping[str, tuple[tuple[int, ...], ...]], how: str
) -> str:
    """The text of a copy of ``config`` with each teacher's groups of layers.

    What ``config`` extends is written out; comments are not kept.

    Raises:
        ConfigError: ``config`` cannot be read, or the copy is no valid configuration.
    """
    from ..files.config import build
    from ..pretrain.settings import ModelFile, read_model_yaml

    data = read_model_yaml(config)
    data.setdefault("aggregation", "separate")
    for name, found in groups.items():
        teacher = data["teachers"][name]
        teacher.pop("layers", None)
        teacher["groups"] = [list(group) for group in found]
    build(ModelFile, data, f"{config} with groups of layers")
    body = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)
    return (
        f"# {config.name} with groups of layers (SKILL, arXiv 2402.16830), found by:\n"
        f"#   s3prl-ekd layers, {how}\n" + body
    )
