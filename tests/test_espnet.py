"""ESPnet and SpeechBrain with a student: ``docs/espnet.md`` as typed, and their gradients.

For an environment with ESPnet, which ``make test-espnet`` sets up.
"""

from __future__ import annotations

import importlib.util
import string
import sys

import pytest
import soundfile
import torch
import yaml

import s3prl_ekd
from s3prl_ekd.system.s3prl_distribution import installation

from .conftest import make_sound
from .documented import Machine, commands, snippets

# fixtures
from .test_fine_tuning import exported, gradients, of_transformers, padded  # noqa: F401

PAGE = "docs/espnet.md"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.espnet,
    pytest.mark.skipif(
        importlib.util.find_spec("espnet2") is None, reason="needs ESPnet: make test-espnet"
    ),
]
TEXTS = ("A CAT", "THE DOG", "A DOG SAT", "THE CAT SAT")
# The rest of the configs, which on the page have the frontend only.
TRAINING = {
    "token_type": "char",
    "token_list": "data/tokens.txt",
    "encoder": "transformer",
    "encoder_conf": {"num_blocks": 1, "output_size": 16, "attention_heads": 2, "linear_units": 16},
    "decoder": "transformer",
    "decoder_conf": {"num_blocks": 1, "attention_heads": 2, "linear_units": 16},
    "model_conf": {"ctc_weight": 0.3},
    "optim": "adam",
    "batch_type": "unsorted",
    "batch_size": 4,
    "max_epoch": 1,
    "num_workers": 0,
    **{
        f"{split}_{key}": value
        for split, folder in (("train", "data/train"), ("valid", "data/dev"))
        for key, value in {
            "data_path_and_name_and_type": [
                [f"{folder}/wav.scp", "speech", "sound"],
                [f"{folder}/text", "text", "text"],
            ],
            "shape_file": [f"{folder}/shape"],
        }.items()
    },
}


def write_data(folder) -> None:
    """Eight utterances of noise a split, in ESPnet's (Kaldi's) files."""
    for split in ("train", "dev"):
        (folder / split).mkdir(parents=True)
        rows = []
        for i in range(8):
            wave, path = make_sound(0.8 + 0.05 * i, seed=i), folder / split / f"{i}.wav"
            soundfile.write(path, wave, 16000)
            rows.append((f"{split}{i}", path, TEXTS[i % 4], len(wave)))
        for name, column in (("wav.scp", 1), ("text", 2), ("shape", 3)):
            lines = [f"{row[0]} {row[column]}\n" for row in rows]
            (folder / split / name).write_text("".join(lines))
    # more tokens than the 20 hypotheses of a beam
    tokens = ["<blank>", "<unk>", "<space>", *string.ascii_uppercase, "<sos/eos>"]
    (folder / "tokens.txt").write_text("\n".join(tokens) + "\n")


def test_this_environment_has_espnets_s3prl_alone():
    assert [claim.name for claim in installation().claims] == ["espnet-s3prl"]
    assert installation().problem == ""


def test_the_page_is_run_as_typed(tmp_path):
    machine = Machine(tmp_path)
    machine.write_student()
    write_data(machine.folder / "data")
    typed = []
    for snippet in snippets(PAGE):
        if snippet.language == "yaml":
            name = snippet.text.splitlines()[0].removeprefix("# ")
            config = {**yaml.safe_load(snippet.text), **TRAINING}
            (machine.folder / name).write_text(yaml.safe_dump(config))
        if snippet.language == "python":
            machine.type(f"{sys.executable} - <<'END'\n{snippet.text}END")
            typed.append(snippet.text)
        if snippet.language == "sh":
            for command in commands(snippet.text):
                if not command.startswith("pip "):  # of the installation
                    typed.append(machine.type(command))
    for name in ("ekd", "hf_hubert", "huggingface"):
        assert (machine.folder / f"exp/{name}/valid.loss.best.pth").is_file()
        weights = torch.load(machine.folder / f"exp/{name}/valid.loss.best.pth")
        assert any("feature_extractor" in key for key in weights)
    decoded = (machine.folder / "exp/ekd/decoded/1best_recog/text").read_text().splitlines()
    assert len(decoded) == 8
    assert "espnet-s3prl" in typed[0] and len(typed) == 8


@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_gradients_are_the_same_by_every_route(exported, padded, scale):  # noqa: F811
    from espnet2.asr.frontend.huggingface import HuggingFaceFrontend
    from espnet2.asr.frontend.s3prl import S3prlFrontend
    from speechbrain.integrations.huggingface.hubert import HuBERT

    s3prl_ekd.register()
    file, folder = exported(scale)
    waves, lengths = padded
    expected = of_transformers(folder, padded)
    routes = {}
    for name, path in (("ekd_student", file), ("hf_hubert_custom", folder)):
        frontend = S3prlFrontend(frontend_conf={"upstream": name, "path_or_url": str(path)})
        states, _ = frontend.train()(waves, lengths)
        model = frontend.upstream.upstream.model
        routes[name] = gradients(states, model, name != "ekd_student")
    frontend = HuggingFaceFrontend(str(folder))
    states, frames = frontend.train()(waves, lengths)
    assert frames.tolist() == [49, 27]
    routes["huggingface"] = gradients(states, frontend.encoder, True)
    lobe = HuBERT(str(folder), save_path=str(folder.parent / "cache")).train()
    states = lobe(waves, lengths / waves.shape[1])
    routes["speechbrain"] = gradients(states, lobe.model, True)
    for route, found in routes.items():
        assert found.keys() == expected.keys(), route
        for name, gradient in found.items():
            limit = 1e-4 * expected[name].abs().max() + 1e-6
            assert (gradient - expected[name]).abs().max() < limit, (route, name)
