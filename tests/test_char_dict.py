"""The character dictionary and the two ASR recipes, read by s3prl's classes."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
import yaml
from s3prl.downstream.asr.dictionary import Dictionary
from s3prl.downstream.asr.expert import DownstreamExpert

from s3prl_ekd.prepare.asr import LETTERS, foreign_characters, normalise

from .conftest import recipe

RECIPE = Path(__file__).parents[1] / "downstream_recipes" / "asr"
ALPHABET = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ") + ["'", "|"]


@pytest.fixture
def dictionary():
    return Dictionary.load(str(RECIPE / "char.dict"))


def test_the_file_has_all_letters_and_the_word_boundary():
    text = (RECIPE / "char.dict").read_text(encoding="utf-8")
    assert text == "".join(f"{symbol} 1\n" for symbol in "|" + LETTERS)


def test_s3prl_loads_28_symbols_and_adds_4(dictionary):
    assert len(dictionary) == 32
    assert sorted(dictionary.symbols[4:]) == sorted(ALPHABET)
    assert dictionary.symbols[:4] == ["<s>", "<pad>", "</s>", "<unk>"]


def test_indices_are_unique(dictionary):
    line = " ".join(ALPHABET)
    encoded = dictionary.encode_line(line, add_if_not_exist=False, append_eos=False).tolist()
    assert dictionary.unk() not in encoded
    assert len(set(encoded)) == 28 and min(encoded) == 4
    assert dictionary.string(torch.tensor(encoded)) == line


def test_normalise_and_foreign_characters():
    assert normalise("  it's\ta  Day\n") == "IT'S A DAY"
    assert foreign_characters("IT'S A DAY") == ""
    assert foreign_characters("NO. 42, É É") == ",.24É"
    assert foreign_characters("ASTRE|K") == "|"  # a text must not contain the word boundary


@pytest.mark.parametrize("name", ["config.yaml", "tiny.yaml"])
def test_total_steps_is_a_multiple_of_the_other_steps(name):
    runner = recipe(f"asr/{name}")["runner"]
    for key in ("log_step", "eval_step", "save_step"):
        assert runner["total_steps"] % runner[key] == 0, key
    assert (
        set(runner["eval_dataloaders"])
        <= recipe(f"asr/{name}")["downstream_expert"]["datarc"].keys()
    )
    assert (RECIPE / name).read_text(encoding="utf-8").startswith("# ASR")


def test_the_full_recipe_has_superbs_numbers():
    config = recipe("asr/config.yaml")
    assert config["runner"]["total_steps"] == 200_000
    assert config["optimizer"] == {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": 1e-4}
    assert config["downstream_expert"]["datarc"]["batch_size"] == 32
    assert config["downstream_expert"]["modelrc"]["RNNs"]["dim"] == [1024, 1024]
    assert config["specaug"]["time_mask_width_range"] == [0, 40]


def test_the_full_recipe_equals_that_of_a_checkout():
    import s3prl

    path = Path(s3prl.__file__).parent / "downstream/asr/config.yaml"
    if not path.is_file():
        pytest.skip("s3prl from PyPI has no downstream/asr/config.yaml; a checkout has")
    expected = yaml.safe_load(path.read_text())
    recipe_config = recipe("asr/config.yaml")
    for config in (recipe_config, expected):
        for key in ("libri_root", "bucket_file"):
            del config["downstream_expert"]["datarc"][key]
        for key in ("kenlm_model", "lexicon"):
            del config["downstream_expert"]["datarc"]["decoder_args"][key]
    assert recipe_config == expected


def test_the_tiny_model_trains(tmp_path):
    """s3prl's expert with tiny.yaml overfits random features: CTC falls, decoding is right."""
    config = recipe("asr/tiny.yaml")["downstream_expert"]
    config["datarc"]["dict_path"] = str(RECIPE / "char.dict")
    torch.manual_seed(0)
    expert = DownstreamExpert(24, 320, config, expdir=str(tmp_path))
    assert sum(weight.numel() for weight in expert.parameters()) < 1_000_000
    features = [torch.randn(60, 24), torch.randn(45, 24)]
    texts = ["H I |", "Y E S |"]
    labels = [expert.dictionary.encode_line(text).numpy() for text in texts]
    optimizer = torch.optim.Adam(expert.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        records = defaultdict(list)
        loss = expert("train", features, labels, ["a", "b"], records)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    expert.eval()
    assert expert.inference(features, []) == ["HI", "YES"]
