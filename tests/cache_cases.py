"""Target caches for tests: configs, the command, and s3prl's own hidden states."""

import torch
import yaml

from s3prl_ekd import cli
from s3prl_ekd.pretrain.expert import UpstreamPretrainExpert

from .conftest import NO_DROPOUT, edit_yaml, write_configs

LAYERS = (2, 4)  # of write_configs


def configs(folder, teachers, corpus, data=None, **model):
    """Write ``runner.yaml`` and ``model.yaml``, without excerpts unless ``data`` sets them."""
    write_configs(folder, teachers, corpus, **{"student": NO_DROPOUT, **model})
    with edit_yaml(folder / "runner.yaml") as config:
        config["pretrain_expert"]["datarc"] |= {"sequence_length": 0, **(data or {})}


def cache(folder, out, *argv):
    """Run ``s3prl-ekd cache`` in this process; return the exit code."""
    names = [str(folder / name) for name in ("runner.yaml", "model.yaml")]
    more = ["--device", "cpu", "-o", str(out), *argv]
    try:
        return cli.main(["cache", "-c", names[0], "-g", names[1], *more])
    except SystemExit as error:
        return error.code


def make_caches(folder, teachers, corpus):
    """Build a cache of each dtype, of full utterances and s3prl's teachers."""
    configs(folder, teachers, corpus, teacher_backend="s3prl")
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
    """s3prl's own upstreams."""
    from s3prl.upstream.hubert.expert import UpstreamExpert as Hubert
    from s3prl.upstream.wavlm.expert import UpstreamExpert as WavLM

    classes = {"hubert": Hubert, "robust": Hubert, "wavlm": WavLM}
    return {name: expert(str(teachers[name])).eval() for name, expert in classes.items()}


def hidden_states(expert, sound):
    """The target layers of one utterance: ``[layer, frame, dim]``."""
    with torch.no_grad():
        states = expert([torch.from_numpy(sound)])["hidden_states"]
    return torch.stack([states[layer][0] for layer in LAYERS])


def files(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.suffix in (".bin", ".json")}
