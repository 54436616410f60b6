"""Caches of stored targets for tests: their configs, the command, and s3prl's own answers."""

import torch
import yaml

from s3prl_ekd import cli
from s3prl_ekd.pretrain.expert import UpstreamPretrainExpert

from .conftest import STUDENT, write_configs

STILL = {**STUDENT, **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)}
LAYERS = (2, 4)  # of write_configs


def configs(folder, teachers, corpus, data=None, **model):
    """``runner.yaml`` and ``model.yaml``, whole utterances unless ``data`` says otherwise."""
    write_configs(folder, teachers, corpus, **{"student": STILL, **model})
    config = yaml.safe_load((folder / "runner.yaml").read_text())
    config["pretrain_expert"]["datarc"] |= {"sequence_length": 0, **(data or {})}
    (folder / "runner.yaml").write_text(yaml.safe_dump(config))


def cache(folder, out, *words):
    """``s3prl-ekd cache`` in this process; the exit code."""
    names = [str(folder / name) for name in ("runner.yaml", "model.yaml")]
    more = ["--device", "cpu", "-o", str(out), *words]
    try:
        return cli.main(["cache", "-c", names[0], "-g", names[1], *more])
    except SystemExit as left:
        return left.code


def make_stored(folder, teachers, corpus):
    """Complete caches by dtype, of whole utterances and plain teachers."""
    configs(folder, teachers, corpus, teacher_path="plain")
    for dtype in ("float16", "bfloat16", "int8"):
        assert cache(folder, folder / dtype, "--dtype", dtype) == 0
    return folder


def datarc(folder, **changes):
    return yaml.safe_load((folder / "runner.yaml").read_text())["pretrain_expert"]["datarc"] | (
        changes
    )


def adapter(folder, **changes):
    torch.manual_seed(7)
    return UpstreamPretrainExpert(
        datarc(folder, **changes), str(folder / "model.yaml"), device="cpu"
    )


def experts(teachers):
    """s3prl's own upstreams, which know nothing of ours."""
    from s3prl.upstream.hubert.expert import UpstreamExpert as Hubert
    from s3prl.upstream.wavlm.expert import UpstreamExpert as WavLM

    kinds = {"hubert": Hubert, "robust": Hubert, "wavlm": WavLM}
    return {name: kind(str(teachers[name])).eval() for name, kind in kinds.items()}


def alone(expert, sound):
    with torch.no_grad():
        states = expert([torch.from_numpy(sound)])["hidden_states"]
    return torch.stack([states[layer][0] for layer in LAYERS])  # [layer, frame, dim]


def files(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.suffix in (".bin", ".json")}
