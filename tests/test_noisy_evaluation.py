"""The test under noise: exact ratios, noise that depends on the utterance alone, and a run."""

import math
import re
from argparse import Namespace

import numpy as np
import pytest
import soundfile
import torch
from s3prl.upstream.baseline.hubconf import fbank_no_cmvn
from s3prl.utility.helper import override

from s3prl_ekd import cli
from s3prl_ekd.downstream.noise import find_noises, mix, noisy
from s3prl_ekd.downstream.run import in_noisy_folder, prepare
from s3prl_ekd.errors import DataError, EkdError, SetupError
from s3prl_ekd.files.config import literal
from s3prl_ekd.request import DownstreamRequest, NoisyTest

from .conftest import command, make_sound, run_python
from .test_er_recipe import make_manifest


@pytest.fixture(scope="module")
def noise_folder(tmp_path_factory):
    """Three noises: shorter than an utterance, longer, and silent; one at 44.1 kHz in stereo."""
    folder = tmp_path_factory.mktemp("data") / "street"
    (folder / "more").mkdir(parents=True)
    soundfile.write(folder / "a.wav", make_sound(0.2, seed=11), 16000)
    soundfile.write(folder / "b.flac", make_sound(1.2, seed=12), 16000)
    soundfile.write(folder / "more/c.wav", make_sound(0.7, 44100, channels=2, seed=13), 44100)
    soundfile.write(folder / "silent.wav", np.zeros(9000), 16000)
    return folder


@pytest.fixture
def noises(noise_folder):
    return find_noises(noise_folder)


def ratio(clean, noise) -> float:
    """dB, in double precision, by the definition."""
    return 10 * math.log10(float((clean.double() ** 2).sum() / (noise.double() ** 2).sum()))


@pytest.mark.parametrize("snr", [-5.0, 0.0, 7.5, 20.0])
def test_the_ratio_is_the_one_asked_for(waves, noises, snr):
    for wave in waves:
        mixed = mix(wave, noises, snr)
        assert mixed.shape == wave.shape and mixed.dtype == wave.dtype
        assert ratio(wave, mixed - wave) == pytest.approx(snr, abs=0.01)


def test_the_noise_is_a_recording_from_some_start(waves, noises):
    """The difference to the clean waveform is one of the files, scaled, looped or cut."""
    read = [noises[index] for index in range(len(noises))]
    for wave in (waves[0][:1500], waves[1][:2000], waves[2][:4000]):
        added = (mix(wave, noises, 0.0) - wave).double()
        added = added / added.norm()
        found = 0.0
        for noise in read:
            if not noise.any():
                continue
            times = math.ceil((2 * len(wave)) / len(noise)) + 1
            loop = noise.repeat(times) if len(noise) < len(wave) else noise
            windows = loop.double().unfold(0, len(wave), 1)
            found = max(found, float((windows @ added / windows.norm(dim=1)).max()))
        assert found == pytest.approx(1.0, abs=1e-4)


def test_an_utterance_has_its_noise_in_any_order_and_at_any_ratio(waves, noise_folder):
    there = [mix(wave, find_noises(noise_folder), 5.0, seed=3) for wave in waves]
    noises = find_noises(noise_folder)
    back = [mix(wave, noises, 5.0, seed=3) for wave in reversed(waves)]
    assert all(torch.equal(a, b) for a, b in zip(there, reversed(back), strict=True))
    loud, soft = (mix(waves[0], noises, snr) - waves[0] for snr in (0.0, 20.0))
    torch.testing.assert_close(loud, 10 * soft, rtol=0, atol=1e-5)
    assert not torch.equal(mix(waves[0], noises, 5.0, seed=4), there[0])
    other = waves[0].clone()
    other[0] += 1e-3  # another utterance, another draw
    assert not torch.allclose(mix(other, noises, 0.0) - other, loud, atol=1e-3)


def test_another_process_draws_the_same(noise_folder):
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from s3prl_ekd.downstream.noise import find_noises, mix\n"
        "wave = torch.sin(torch.arange(5000) / 7)\n"
        "print(mix(wave, find_noises(sys.argv[1]), 3.0).double().sum().item())"
    )
    wave = torch.sin(torch.arange(5000) / 7)
    here = mix(wave, find_noises(noise_folder), 3.0).double().sum().item()
    assert float(run_python(code, str(noise_folder))) == pytest.approx(here, abs=1e-9)


def test_silence_is_left_alone_and_silent_noises_are_passed_over(noises):
    silence = torch.zeros(4000)
    assert torch.equal(mix(silence, noises, 0.0), silence)
    for seed in range(20):  # some of the draws begin at the silent one
        assert mix(torch.ones(500), noises, 0.0, seed).isfinite().all()
    with pytest.raises(DataError, match="every one of the 2 noises is silent"):
        mix(torch.ones(500), [torch.zeros(90), torch.zeros(80)], 0.0)


def test_each_file_is_read_once(noises, monkeypatch, waves):
    before = mix(waves[0], noises, 0.0)
    for index in range(len(noises)):
        noises[index]
    monkeypatch.setattr("s3prl_ekd.downstream.noise.read_audio", None)
    assert torch.equal(mix(waves[0], noises, 0.0), before)


def test_a_manifest_gives_its_test_lines(noise_folder):
    table = noise_folder / "noises.tsv"
    table.write_text("path\tsplit\na.wav\ttrain\nb.flac\ttest\nmore/c.wav\ttest\n")
    assert list(find_noises(table).names) == ["b.flac", "more/c.wav"]
    table.write_text("path\tsplit\na.wav\ttrain\n")
    with pytest.raises(DataError, match="no line in the split test"):
        find_noises(table)
    table.unlink()


# --- in s3prl's Runner


class Runner:
    """What s3prl's has of ours: an upstream in a model entry."""

    def __init__(self, args, config):
        self.upstream = Namespace(model=fbank_no_cmvn().eval())


@pytest.mark.parametrize("size", [1, 3])
def test_hidden_states_are_those_of_waveforms_mixed_by_hand(waves, noise_folder, noises, size):
    model = noisy(Runner, NoisyTest(str(noise_folder), 5.0, seed=2))(None, None).upstream.model
    plain = fbank_no_cmvn().eval()
    for start in range(0, len(waves), size):
        batch = waves[start : start + size]
        by_hand = [mix(wave, noises, 5.0, seed=2) for wave in batch]
        for heard, wanted in zip(
            model(batch)["hidden_states"], plain(by_hand)["hidden_states"], strict=True
        ):
            assert torch.equal(heard, wanted)
        assert not torch.equal(heard, plain(batch)["hidden_states"][-1])


@pytest.mark.parametrize("path", ["a/b_snr5", "it's", "a=b,,c", 'q"=\\', "x y"])
def test_any_folder_passes_through_s3prls_override(path, capsys):
    args = Namespace(expdir="old")
    override(f"config.a.b=1,,args.expdir={literal(path)}", args, {})
    assert args.expdir == path


def test_names_of_folders():
    assert NoisyTest("data/street", 5.0).name == "street_snr5"
    assert NoisyTest("data/street.tsv", -2.5, 3).name == "street_snr-2.5_seed3"
    test = NoisyTest("-odd", -5.0, -1)
    parse = DownstreamRequest.parse
    assert parse(["-m", "evaluate", *test.argv()]) == DownstreamRequest(mode="evaluate", noise=test)
    assert parse(["-n", "x", "-o", "a=-1"]) == DownstreamRequest(expname="x", override="a=-1")
    assert parse(["--noise", "d", "--snr", "-5"]).noise == NoisyTest("d", -5.0)


@pytest.mark.parametrize(
    "words, message",
    [
        (("-m", "evaluate", "--noise", "NONE", "--snr", "5"), "no such folder of noises"),
        (("-m", "evaluate", "--noise", "EMPTY", "--snr", "5"), "has no audio"),
        (("-m", "evaluate", "--noise", "DIR", "--snr", "loud"), "--snr loud: a number of dB"),
        (("-m", "evaluate", "--noise", "DIR", "--snr", "nan"), "--snr nan: a number of dB"),
        (("-m", "evaluate", "--noise", "DIR"), "--snr 5"),
        (("-m", "evaluate", "--snr", "5"), "--noise DIR"),
        (("-m", "evaluate", "--noise", "--snr", "5"), "--noise DIR"),
        (("-m", "evaluate", "--noise_seed", "1"), "--noise DIR"),
        (("-m", "evaluate", "--noise", "DIR", "--snr", "5", "--noise_seed", "x"), "whole number"),
        (("-m", "train", "--noise", "DIR", "--snr", "5"), "-m evaluate only, not with -m train"),
        (("--noise", "DIR", "--snr", "5"), "-m evaluate only, not with no -m"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, noise_folder, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    words = [str(noise_folder) if word == "DIR" else word for word in words]
    with pytest.raises(EkdError, match=re.escape(message)) as raised:
        prepare([*words, "-e", "x.ckpt"])
    assert isinstance(raised.value, (SetupError, DataError)) and "\n" not in str(raised.value)


# --- a run


def test_a_noisy_evaluation_leaves_the_clean_one_alone(tmp_path, noise_folder):
    manifest = make_manifest(tmp_path / "corpus")
    work = tmp_path / "work"
    cli.main(["init", str(work)])
    words = ["prepare", "er", manifest, "-o", work / "data/er", "--fold-column", "group"]
    cli.main([str(word) for word in words])
    steps = "config.runner.total_steps=30,,config.runner.eval_step=30,,config.runner.save_step=30"
    steps += ",,config.runner.log_step=30,,config.optimizer.lr=0.01"
    steps += ",,config.runner.eval_dataloaders=['dev', 'test']"  # the clean predictions
    words = ["-m", "train", "-u", "fbank_no_cmvn", "-d", "emotion", "-n", "x", "-o", steps]
    words += ["-c", "downstream/emotion/tiny.yaml", "--device", "cpu"]
    command("run_downstream.py", *words, cwd=work)
    folder = work / "result/downstream/x"
    test = ["run_downstream.py", "-m", "evaluate", "-t", "test", "--device", "cpu"]
    test += ["-e", "result/downstream/x/dev-best.ckpt"]
    before = {path: path.read_bytes() for path in folder.iterdir()}

    # -30 dB: the hums are drowned, and what is predicted is no longer what is true
    options = ("--noise", noise_folder, "--snr", "-30")
    done = command(*test, *options, "-o", "config.runner.evaluate_ratio=1", cwd=work)
    assert "one of 4 noises at -30 dB" in done.stderr
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    below = folder / "noisy" / "street_snr-30"
    clean, noise = ((f / "test_fold1_predict.txt").read_text() for f in (folder, below))
    truth = (folder / "test_fold1_truth.txt").read_text()
    assert (below / "test_fold1_truth.txt").read_text() == truth == clean != noise


def test_the_folder_goes_among_the_overrides_unless_the_user_put_one_there(tmp_path):
    test, expdir = NoisyTest("street", 5.0), tmp_path / "it's=x"
    request = DownstreamRequest(noise=test, expdir=str(expdir), override="config.a=1")
    args, config = Namespace(expdir="old"), {}
    override(in_noisy_folder(request).override, args, config)
    assert config == {"a": 1}
    assert args.expdir == str(expdir / "noisy/street_snr5") and (expdir / "noisy").is_dir()
    options = "config.a=1,, args.expdir = 'mine'"
    request = DownstreamRequest(noise=test, expdir=str(tmp_path / "other"), override=options)
    assert in_noisy_folder(request) == request
    assert not (tmp_path / "other").exists()
