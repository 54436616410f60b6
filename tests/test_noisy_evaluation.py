"""Evaluation under noise: exact SNR, noise that depends only on the utterance, and a run."""

import math
import re
from argparse import Namespace

import pytest
import torch
from s3prl.upstream.baseline.hubconf import fbank_no_cmvn
from s3prl.utility.helper import override

from s3prl_ekd import cli
from s3prl_ekd.downstream.noise import find_noises, mix, noisy_runner
from s3prl_ekd.downstream.run import in_noisy_folder, prepare
from s3prl_ekd.errors import DataError, EkdError, SetupError
from s3prl_ekd.files.config import override_value
from s3prl_ekd.request import DownstreamRequest, NoisyTest

from .conftest import command, run_python
from .corpora import write_er_manifest


@pytest.fixture
def noises(noise_folder):
    return find_noises(noise_folder)


def snr_of(clean, noise) -> float:
    """The SNR in dB by its definition, in float64."""
    return 10 * math.log10(float((clean.double() ** 2).sum() / (noise.double() ** 2).sum()))


@pytest.mark.parametrize("snr", [-5.0, 0.0, 7.5, 20.0])
def test_the_snr_is_exact(waves, noises, snr):
    for wave in waves:
        mixed = mix(wave, noises, snr)
        assert mixed.shape == wave.shape and mixed.dtype == wave.dtype
        assert snr_of(wave, mixed - wave) == pytest.approx(snr, abs=0.01)


def test_the_noise_is_one_of_the_files(waves, noises):
    """The difference to the clean waveform is one of the files, scaled, repeated or cropped."""
    waveforms = [noises[index] for index in range(len(noises))]
    for wave in (waves[0][:1500], waves[1][:2000], waves[2][:4000]):
        added = (mix(wave, noises, 0.0) - wave).double()
        added = added / added.norm()
        similarity = 0.0
        for noise in waveforms:
            if not noise.any():
                continue
            times = math.ceil((2 * len(wave)) / len(noise)) + 1
            loop = noise.repeat(times) if len(noise) < len(wave) else noise
            windows = loop.double().unfold(0, len(wave), 1)
            similarity = max(similarity, float((windows @ added / windows.norm(dim=1)).max()))
        assert similarity == pytest.approx(1.0, abs=1e-4)


def test_the_noise_does_not_depend_on_order_or_snr(waves, noise_folder):
    forward = [mix(wave, find_noises(noise_folder), 5.0, seed=3) for wave in waves]
    noises = find_noises(noise_folder)
    backward = [mix(wave, noises, 5.0, seed=3) for wave in reversed(waves)]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    loud, soft = (mix(waves[0], noises, snr) - waves[0] for snr in (0.0, 20.0))
    torch.testing.assert_close(loud, 10 * soft, rtol=0, atol=1e-5)
    assert not torch.equal(mix(waves[0], noises, 5.0, seed=4), forward[0])
    changed = waves[0].clone()
    changed[0] += 1e-3  # a different utterance gets a different noise
    assert not torch.allclose(mix(changed, noises, 0.0) - changed, loud, atol=1e-3)


def test_the_noise_is_the_same_in_another_process(noise_folder):
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from s3prl_ekd.downstream.noise import find_noises, mix\n"
        "wave = torch.sin(torch.arange(5000) / 7)\n"
        "print(mix(wave, find_noises(sys.argv[1]), 3.0).double().sum().item())"
    )
    wave = torch.sin(torch.arange(5000) / 7)
    expected = mix(wave, find_noises(noise_folder), 3.0).double().sum().item()
    assert float(run_python(code, str(noise_folder))) == pytest.approx(expected, abs=1e-9)


def test_silent_utterances_are_unchanged_and_silent_noises_are_skipped(noises):
    silence = torch.zeros(4000)
    assert torch.equal(mix(silence, noises, 0.0), silence)
    for seed in range(20):  # some seeds draw the silent noise first
        assert mix(torch.ones(500), noises, 0.0, seed).isfinite().all()
    with pytest.raises(DataError, match=r"\b2\b.*silent"):
        mix(torch.ones(500), [torch.zeros(90), torch.zeros(80)], 0.0)


def test_each_file_is_read_once(noises, monkeypatch, waves):
    before = mix(waves[0], noises, 0.0)
    for index in range(len(noises)):
        noises[index]
    monkeypatch.setattr("s3prl_ekd.downstream.noise.read_audio", None)
    assert torch.equal(mix(waves[0], noises, 0.0), before)


def test_only_the_test_split_of_a_manifest_is_used(noise_folder):
    table = noise_folder / "noises.tsv"
    table.write_text("path\tsplit\na.wav\ttrain\nb.flac\ttest\nmore/c.wav\ttest\n")
    assert list(find_noises(table).names) == ["b.flac", "more/c.wav"]
    table.write_text("path\tsplit\na.wav\ttrain\n")
    with pytest.raises(DataError, match=r"noises\.tsv.*\btest\b"):
        find_noises(table)
    table.unlink()


# --- in s3prl's Runner


class Runner:
    """The attribute of s3prl's Runner in use: an upstream with its model."""

    def __init__(self, args, config):
        self.upstream = Namespace(model=fbank_no_cmvn().eval())


@pytest.mark.parametrize("size", [1, 3])
def test_hidden_states_equal_those_of_waveforms_mixed_by_hand(waves, noise_folder, noises, size):
    test = NoisyTest(str(noise_folder), 5.0, seed=2)
    model = noisy_runner(Runner, test)(None, None).upstream.model
    clean_model = fbank_no_cmvn().eval()
    for start in range(0, len(waves), size):
        batch = waves[start : start + size]
        by_hand = [mix(wave, noises, 5.0, seed=2) for wave in batch]
        results = model(batch)["hidden_states"]
        for result, expected in zip(results, clean_model(by_hand)["hidden_states"], strict=True):
            assert torch.equal(result, expected)
        assert not torch.equal(results[-1], clean_model(batch)["hidden_states"][-1])


@pytest.mark.parametrize("path", ["a/b_snr5", "it's", "a=b,,c", 'q"=\\', "x y"])
def test_any_folder_name_passes_s3prls_override(path, capsys):
    args = Namespace(expdir="old")
    override(f"config.a.b=1,,args.expdir={override_value(path)}", args, {})
    assert args.expdir == path


def test_folder_names_and_arguments():
    assert NoisyTest("data/street", 5.0).name == "street_snr5"
    assert NoisyTest("data/street.tsv", -2.5, 3).name == "street_snr-2.5_seed3"
    test = NoisyTest("-odd", -5.0, -1)
    parse = DownstreamRequest.parse
    assert parse(["-m", "evaluate", *test.argv()]) == DownstreamRequest(mode="evaluate", noise=test)
    assert parse(["-n", "x", "-o", "a=-1"]) == DownstreamRequest(expname="x", override="a=-1")
    assert parse(["--noise", "d", "--snr", "-5"]).noise == NoisyTest("d", -5.0)


@pytest.mark.parametrize(
    "options, variables",
    [
        (("-m", "evaluate", "--noise", "NONE", "--snr", "5"), "NONE"),
        (("-m", "evaluate", "--noise", "EMPTY", "--snr", "5"), "EMPTY"),
        (("-m", "evaluate", "--noise", "DIR", "--snr", "loud"), "--snr loud"),
        (("-m", "evaluate", "--noise", "DIR", "--snr", "nan"), "--snr nan"),
        (("-m", "evaluate", "--noise", "DIR"), "--snr 5"),
        (("-m", "evaluate", "--snr", "5"), "--noise DIR"),
        (("-m", "evaluate", "--noise", "--snr", "5"), "--noise DIR"),
        (("-m", "evaluate", "--noise_seed", "1"), "--noise DIR"),
        (("-m", "evaluate", "--noise", "DIR", "--snr", "5", "--noise_seed", "x"), "--noise_seed x"),
        (("-m", "train", "--noise", "DIR", "--snr", "5"), "-m train"),
        (("--noise", "DIR", "--snr", "5"), "--noise"),
    ],
)
def test_wrong_options_are_one_line_errors(tmp_path, noise_folder, monkeypatch, options, variables):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    argv = [str(noise_folder) if option == "DIR" else option for option in options]
    with pytest.raises(EkdError) as raised:
        prepare([*argv, "-e", "x.ckpt"])
    message = str(raised.value)
    assert isinstance(raised.value, (SetupError, DataError)) and "\n" not in message
    for value in variables.split():
        start = r"(?<![\w.-])" if value[0] == "-" or len(value) == 1 else r"(?<!\w)"
        assert re.search(rf"{start}{re.escape(value)}(?![\w-])", message), (value, message)


# --- a run


def test_a_noisy_evaluation_does_not_change_the_clean_one(tmp_path, noise_folder):
    manifest = write_er_manifest(tmp_path / "corpus")
    work = tmp_path / "work"
    cli.main(["init", str(work)])
    argv = ["prepare", "er", manifest, "-o", work / "data/er", "--fold-column", "group"]
    cli.main([str(argument) for argument in argv])
    steps = "config.runner.total_steps=30,,config.runner.eval_step=30,,config.runner.save_step=30"
    steps += ",,config.runner.log_step=30,,config.optimizer.lr=0.01"
    steps += ",,config.runner.eval_dataloaders=['dev', 'test']"  # the clean predictions
    argv = ["-m", "train", "-u", "fbank_no_cmvn", "-d", "emotion", "-n", "x", "-o", steps]
    argv += ["-c", "downstream/emotion/tiny.yaml", "--device", "cpu"]
    command("run_downstream.py", *argv, cwd=work)
    folder = work / "result/downstream/x"
    test = ["run_downstream.py", "-m", "evaluate", "-t", "test", "--device", "cpu"]
    test += ["-e", "result/downstream/x/dev-best.ckpt"]
    before = {path: path.read_bytes() for path in folder.iterdir()}

    # at -30 dB the signal is masked, so the predictions are wrong
    options = ("--noise", noise_folder, "--snr", "-30")
    result = command(*test, *options, "-o", "config.runner.evaluate_ratio=1", cwd=work)
    assert re.search(r"\b4\b.*-30 dB", result.stderr)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    noisy_folder = folder / "noisy" / "street_snr-30"
    clean, noisy = ((f / "test_fold1_predict.txt").read_text() for f in (folder, noisy_folder))
    truth = (folder / "test_fold1_truth.txt").read_text()
    assert (noisy_folder / "test_fold1_truth.txt").read_text() == truth == clean != noisy


def test_the_folder_is_added_to_the_overrides_unless_the_user_sets_it(tmp_path):
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
