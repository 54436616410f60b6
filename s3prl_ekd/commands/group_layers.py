"""Cluster each teacher's layers into groups to distil (SKILL, arXiv 2402.16830).

Runs the teachers on some utterances, computes the similarities of each teacher's transformer layers
and clusters them hierarchically. Writes a copy of CONFIG in which each teacher has `groups` instead
of `layers`: the target of a group is the average of its layers. The dendrograms are written next to
it as PNG. A table of each teacher shows the sizes of its groups for each number of groups, their
silhouette (-1 to 1, high for clear groups; a layer alone counts 0), and the gap: how much the merge
distance would rise with one group fewer.

Paper: groups by hierarchical clustering of layer similarities. Ours, because the paper's text known
to us does not give them: linear CKA, average linkage on 1 - CKA, and for each teacher the number of
groups with the highest silhouette.

example:
  s3prl-ekd group-layers pretrain/ekd/config_model.yaml --data /data/LibriSpeech \\
      -o pretrain/ekd/skill.yaml
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ..errors import ConfigError, SetupError
from ..files.atomic import make_folder, write_text
from ..system.tables import text_table

if TYPE_CHECKING:
    from ..analysis.layers import Cut


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    from ..analysis.choice import add_sample_options

    parser.add_argument("config", metavar="CONFIG", type=Path, help="a model config, as for -g")
    add_sample_options(parser)
    parser.add_argument("-o", "--output", metavar="NEW_CONFIG", type=Path, required=True)
    add = parser.add_argument
    add(
        "--groups", metavar="K", type=int,
        help="groups per teacher (default: the number with the highest silhouette; ours)",
    )  # fmt: skip
    add(
        "--similarity", choices=("cka", "cosine"), default="cka",
        help="linear CKA, or the mean cosine over frames (default: cka; ours)",
    )  # fmt: skip
    add(
        "--linkage",
        choices=("average", "complete", "single", "ward"),
        default="average",
        help="(default: average; ours)",
    )
    add(
        "--contiguous", action="store_true",
        help="group only neighbouring layers (default: any layers; ours)",
    )  # fmt: skip
    add("--force", action="store_true", help="overwrite an existing NEW_CONFIG")


def main(args: argparse.Namespace) -> int:
    """Sample hidden states, cluster the layers, write config and plot."""
    from ..pretrain.settings import load_model_config

    picture = args.output.with_suffix(".png")
    if picture == args.output:
        raise ConfigError(f"-o {args.output}: expected a .yaml file; the plot is a .png file")
    for path in (args.output, picture):
        if path.exists() and not args.force:
            raise ConfigError(f"{path} exists; add --force to overwrite it")
    settings = load_model_config(args.config).teachers

    from ..analysis.choice import choose_audio
    from ..analysis.layers import (
        SIMILARITIES,
        best_cut,
        cuts,
        layer_distances,
        layer_tree,
        require_scipy,
    )
    from ..analysis.plots import plot_trees
    from ..analysis.sample import load_upstreams, sample_layers
    from ..system.figures import require_matplotlib

    require_scipy()  # before minutes of computing
    require_matplotlib()
    paths = choose_audio(args.data, args.audio_root, args.utterances, args.seed)
    sample, used = sample_layers(load_upstreams(settings, args.device), paths)

    trees, groups = {}, {}
    for name, layers in sample.items():
        if args.groups is not None and not 1 <= args.groups <= len(layers) - 1:
            raise ConfigError(
                f"--groups must be 1 to {len(layers) - 1}, the transformer layers of {name}, got "
                f"{args.groups}"
            )
        # Layer 0 is not the output of a transformer layer, so it is in no group (ours).
        similarity = SIMILARITIES[args.similarity](layers[1:]).numpy()
        trees[name] = layer_tree(similarity, args.linkage, args.contiguous)
        options = cuts(trees[name], layer_distances(similarity))
        cut = best_cut(options) if args.groups is None else options[args.groups - 1]
        groups[name] = cut.groups
        print(f"{name}: " + "  ".join(str(list(group)) for group in cut.groups))
        print("\n".join([*cut_table(options, cut), ""]))

    method = f"{args.similarity}, {args.linkage} linkage{', contiguous' if args.contiguous else ''}"
    text = grouped_config(args.config, groups, f"{method}, {used} utterances")
    make_folder(args.output.parent, SetupError)
    write_text(args.output, text)
    plot_trees(trees, groups, f"1 - {args.similarity} ({args.linkage} linkage)", picture)
    print(f"wrote {args.output} and {picture}")
    print(f"next: run_pretrain.py -u ekd -g {shlex.quote(str(args.output))} -n my_student")
    return 0


def cut_table(options: Sequence[Cut], chosen: Cut) -> list[str]:
    """Sizes, silhouette and gap of each number of groups; ``*``: chosen.

    The last row, in which each layer is a group, is there only if it is chosen.
    """
    rows = [("groups", "sizes", "silhouette", "gap")]
    for cut in options if chosen is options[-1] else options[:-1]:
        mark = " *" if cut is chosen else ""
        sizes = " ".join(map(str, cut.sizes))
        quality = "-" if len(cut.groups) == 1 else f"{cut.silhouette:.2f}"
        gap = "-" if len(cut.groups) == 1 else f"{cut.gap:.3f}"
        rows.append((f"{len(cut.groups)}{mark}", sizes, quality, gap))
    return text_table(rows, rule=True)


def grouped_config(
    config: Path, groups: Mapping[str, tuple[tuple[int, ...], ...]], method: str
) -> str:
    """The text of a copy of ``config`` with each teacher's groups of layers.

    The copy contains the settings that ``config`` extends, and no comments.

    Raises:
        ConfigError: ``config`` cannot be read, or the copy is not a valid config.
    """
    from ..files.config import from_plain_data
    from ..pretrain.settings import ModelFile, read_model_yaml

    data = read_model_yaml(config)
    data["aggregation"] = "separate"
    for name, layer_groups in groups.items():
        teacher = data["teachers"][name]
        teacher.pop("layers", None)
        teacher["groups"] = [list(group) for group in layer_groups]
    from_plain_data(ModelFile, data, f"{config} with groups of layers")
    body = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)
    return (
        f"# {config.name} with groups of layers (SKILL, arXiv 2402.16830), found by:\n"
        f"#   s3prl-ekd group-layers, {method}\n" + body
    )
