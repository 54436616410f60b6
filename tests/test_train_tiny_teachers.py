"""tools/train_tiny_teachers.py: model, criterion, labels, batches, files, resuming, errors."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import train_tiny_teachers as tool
from teacher_zoo import checkpoint, curves, noises
from teacher_zoo import recipe as recipes
from teacher_zoo.corpus import Corpus, CorpusUtterance, read_corpus
from teacher_zoo.criterion import EncodedBatch, criterion, spread
from teacher_zoo.dataset import ExcerptDataset
from teacher_zoo.export import export
from teacher_zoo.frames import frame_count, sample_count
from teacher_zoo.labels import FrameLabels, load_labels, make_labels
from teacher_zoo.mfcc import mfcc
from teacher_zoo.mixing import mix_batch, mix_over
from teacher_zoo.models import MaskedPredictor
from teacher_zoo.pairs import PairDataset, pair_baseline, pair_criterion
from teacher_zoo.phones import phone_labels
from teacher_zoo.plan import EndlessBatchSampler, epoch_batches
from teacher_zoo.prosody import prosody
from teacher_zoo.trainer import TrainingOptions, train
from teacher_zoo.zoo import make_zoo

from s3prl_ekd.data.audio import read_audio
from s3prl_ekd.data.manifest.phones import Segment
from s3prl_ekd.errors import CheckpointError, ConfigError, DataError
from s3prl_ekd.teachers import load_upstream
from s3prl_ekd.teachers.checkpoint import load_file

from .conftest import REPO

pytestmark = pytest.mark.slow  # of the developers' tools

SIZE = recipes.TeacherSize(
    channels=16, width=32, ffn=48, heads=4, layers=4, conv_pos=16, conv_pos_groups=4
)
UNITS = recipes.UnitSettings(mfcc_clusters=8, hidden_clusters=6, layer=2, frames=400)
TINY = recipes.TeacherRecipe(
    steps=6, batch_seconds=3.0, mix=0.7, mix_noise=0.5, size=SIZE, units=UNITS
)
OPTIONS = TrainingOptions(log_every=2, dev_every=4)
STAGES = list(recipes.STAGES)
# The shipped teachers that these stages start from are larger than TINY.
SMALL = {
    "speaker": dataclasses.replace(recipes.STAGES["speaker"], start="robust_hubert"),
    "hubert_3": dataclasses.replace(recipes.STAGES["hubert_3"], start="hubert", units="hubert"),
    "phones": dataclasses.replace(recipes.STAGES["phones"], start="robust_hubert"),
}
SHIPPED_STAGES = {name: recipes.STAGES[name] for name in SMALL}


@pytest.fixture(autouse=True)
def small_start(monkeypatch):
    for name, stage in SMALL.items():
        monkeypatch.setitem(recipes.STAGES, name, stage)


@pytest.fixture(scope="session")
def speech(corpus) -> Corpus:
    """A corpus whose utterances are silence in the first half, then one of two phones."""
    read = read_corpus([corpus / "audio"], [], 8000)

    def label(utterances):
        return tuple(
            dataclasses.replace(u, segments=(Segment("AT"[i % 2], u.length // 2, u.length),))
            for i, u in enumerate(utterances)
        )

    return Corpus(label(read.train), label(read.dev))


@pytest.fixture(scope="session")
def zoo(speech, tmp_path_factory) -> Path:
    """All stages with at most six steps, trained without interruption."""
    folder = tmp_path_factory.mktemp("zoo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noises, "_TAKES", 1)
        patch.setattr(noises, "_SECONDS", 3.0)
        for name, stage in SMALL.items():
            patch.setitem(recipes.STAGES, name, stage)
        files = make_zoo(recipes.TEACHERS, speech, TINY, folder, OPTIONS)
    assert list(files) == list(recipes.TEACHERS)
    return folder


def weights(zoo: Path, stage: str) -> dict[str, torch.Tensor]:
    return torch.load(zoo / stage / "checkpoint.pt", weights_only=True)["model"]


# --- the files


@pytest.mark.parametrize("name", recipes.TEACHERS)
def test_files_give_the_hidden_states_of_the_trained_model(zoo, speech, name):
    stage = recipes.STAGES[name]
    classes = {"mfcc": 8, "prosody": 8, "phones": 3, "": 1}.get(stage.units, 6)
    trained = MaskedPredictor(stage.family, TINY, classes)
    trained.load_state_dict(weights(zoo, name))
    for tensor in trained.state_dict().values():  # the file is rounded to float16
        tensor.copy_(tensor.half().float())
    trained.eval()
    path = zoo / stage.file
    hubconf = importlib.import_module(f"s3prl.upstream.{stage.family}.hubconf")
    by_s3prl = getattr(hubconf, f"{stage.family}_local")(str(path)).eval()
    by_package = load_file(path, "teachers.x").eval()
    wave = read_audio(speech.train[-1].path)[:9999]
    with torch.no_grad():
        for expert in (by_s3prl, by_package):
            assert {p.dtype for p in expert.parameters()} == {torch.float32}
            hidden = expert([wave])["hidden_states"]
            assert len(hidden) == 5
            for index in range(1, 5):
                torch.testing.assert_close(hidden[index][0], trained.layer(wave, index))
    stored = torch.load(path, weights_only=True)
    half = stored["model_weight" if stage.family == "hubert" else "model"]
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}


def test_the_random_initialisations_are_exported(zoo):
    files = sorted(p.name for p in (zoo / "random").iterdir())
    assert files == sorted(stage.file for stage in recipes.STAGES.values() if stage.file)
    before = torch.load(zoo / "random/tiny_hubert.pt", weights_only=True)["model_weight"]
    after = torch.load(zoo / "tiny_hubert.pt", weights_only=True)["model_weight"]
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("feature_extractor" in name for name in changed)
    assert any("layers.3" in name for name in changed)


def test_a_later_iteration_starts_with_a_new_head(speech, zoo, tmp_path, monkeypatch):
    shutil.copytree(zoo, tmp_path / "zoo", ignore=shutil.ignore_patterns("hubert", "wavlm"))
    initial = {}

    def copy_weights(self, stop):
        initial.update(copy.deepcopy(self.state.model.state_dict()))
        return False

    monkeypatch.setattr("teacher_zoo.trainer._TrainingLoop.__call__", copy_weights)
    assert make_zoo(("hubert",), speech, TINY, tmp_path / "zoo", OPTIONS) is None
    source = weights(zoo, "hubert_1")
    assert initial.keys() == source.keys()
    changed = {name for name in initial if not torch.equal(initial[name], source[name])}
    assert len(source["backbone.label_embs_concat"]) == 8  # units of MFCC
    assert len(initial["backbone.label_embs_concat"]) == 6
    assert changed == {
        "backbone.label_embs_concat", "backbone.final_proj.weight", "backbone.final_proj.bias"
    }  # fmt: skip
    random_init = torch.load(zoo / "random/tiny_hubert.pt", weights_only=True)["model_weight"]
    for name in changed:  # the head is initialised from the seed
        head = random_init[name.removeprefix("backbone.")].float()
        torch.testing.assert_close(head, initial[name], atol=1e-3, rtol=1e-3)


def test_noise_recordings_distort_the_input_of_robust_hubert(speech, zoo, tmp_path):
    clip = tmp_path / "given" / "saw.wav"
    clip.parent.mkdir()
    soundfile.write(clip, 0.3 * np.sign(np.sin(np.arange(48_000) / 20)), 16_000)
    folder = tmp_path / "zoo" / noises.RECORDED_NOISE
    noises.copy_recordings(noises.find_noise([clip.parent]), folder, already_trained=False)
    shutil.copytree(zoo / "noise", tmp_path / "zoo" / "noise")
    settings = noises.make_distorter(tmp_path / "zoo" / "noise", TINY).settings
    assert settings.noise == (str(tmp_path / "zoo" / "noise"), str(folder))
    assert noises.make_distorter(zoo / "noise", TINY).settings.noise == (str(zoo / "noise"),)
    labels = load_labels(zoo / "units-hubert_1.npz", speech)
    batch = next(iter(epoch_batches(speech.train, 3.0, 2.0, 1, 0)))
    waves = [
        ExcerptDataset(speech.train, labels, 0, "distorted", TINY, noise)[batch][1]
        for noise in (zoo / "noise", tmp_path / "zoo" / "noise")
    ]
    assert waves[0].shape == waves[1].shape and not torch.equal(*waves)
    (folder / "saw.wav").unlink()
    noises.copy_recordings([clip], folder, already_trained=True)  # same names and sizes: no error
    for files, already_trained in (([], False), ([clip, REPO / "README.md"], False)):
        with pytest.raises(ConfigError, match=rf"--noise\b.*\b1\b.*\b{len(files)}\b"):
            noises.copy_recordings(files, folder, already_trained)
    with pytest.raises(ConfigError, match=r"--noise\b.*\b0\b.*\b1\b"):
        make_zoo(("robust_hubert",), speech, TINY, zoo, OPTIONS, noise=[clip])
    with pytest.raises(ConfigError, match=str(tmp_path / "no-file.wav")):
        noises.find_noise([tmp_path / "no-file.wav"])
    with pytest.raises(ConfigError, match=r"--noise.*\bsaw\.wav"):
        noises.find_noise([clip, clip.parent])


def test_logs_and_curves(zoo, speech):
    for name in STAGES:
        log = json.loads((zoo / name / "log.json").read_text())
        points = log["points"]
        steps = {"hubert_1": 3, "prosody": 4, "speaker": 3, "phones": 2}.get(name, 6)
        assert [p["step"] for p in points] == sorted({*range(2, steps + 1, 2), steps})
        last = points[-1]
        assert 0 <= last["dev_accuracy"] <= 1 and math.isfinite(last["dev_prediction_loss"])
        assert ("dev_clean_prediction_loss" in last) == (name in ("robust_hubert", "wavlm"))
        assert (zoo / name / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_has_the_values_of_the_logs(zoo, tmp_path, capsys):
    assert tool.main(["unused", "-o", str(zoo), "--summary"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in STAGES]
    cells = lines[3].strip("| ").split(" | ")  # hubert
    log = json.loads((zoo / "hubert" / "log.json").read_text())
    last = log["points"][-1]
    assert cells[1] == "6" and cells[4] == "6"
    assert abs(float(cells[5]) - last["dev_prediction_loss"]) <= 0.005
    assert abs(float(cells[7].rstrip("%")) / 100 - last["dev_accuracy"]) <= 0.0005
    assert len({line.count("|") for line in lines}) == 1
    assert tool.main(["unused", "-o", str(tmp_path), "--summary"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    (tmp_path / "hubert").mkdir()
    (tmp_path / "hubert" / "log.json").write_text("{")
    assert tool.main(["unused", "-o", str(tmp_path), "--summary"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_full_size_files_have_7_mb_or_less(tmp_path, family):
    recipe = recipes.TeacherRecipe()
    model = MaskedPredictor(family, recipe, recipe.units.hidden_clusters)
    size = export(model, tmp_path / "full.pt")
    assert size <= 7_000_000
    count = sum(p.numel() for p in model.backbone.encoder.parameters())
    count += sum(p.numel() for p in model.backbone.feature_extractor.parameters())
    assert 3.2e6 < count < 3.4e6
    assert len(model.backbone.encoder.layers) == 6


def test_a_weight_that_overflows_float16_is_an_error(tmp_path):
    model = MaskedPredictor("wavlm", TINY, 6)
    with torch.no_grad():
        model.backbone.mask_emb[0] = 1e6
    with pytest.raises(CheckpointError, match="mask_emb.*float16"):
        export(model, tmp_path / "big.pt")
    assert not list(tmp_path.iterdir())


# --- the model and the criterion


def test_hubert_gives_the_loss_of_s3prls_class(monkeypatch):
    """Logits, loss and penalty against HubertModel.forward with its compute_nce."""
    torch.manual_seed(3)
    model = MaskedPredictor("hubert", TINY, 8).eval()
    waves = 0.1 * torch.randn(3, sample_count(24))
    labels = torch.randint(8, (3, 24))
    masked = torch.rand(3, 24) < 0.5

    def apply_mask(x, *_):
        return torch.where(masked[..., None], model.backbone.mask_emb, x), masked

    monkeypatch.setattr(model.backbone, "apply_mask", apply_mask)
    padding = torch.zeros(waves.shape, dtype=torch.bool)
    output = model.backbone(waves, target_list=[labels], padding_mask=padding, mask=True)
    index = torch.zeros(int(masked.sum()), dtype=torch.long)  # s3prl has the correct unit at 0
    loss_m = torch.nn.functional.cross_entropy(output["logit_m_list"][0], index)
    index = torch.zeros(int((~masked).sum()), dtype=torch.long)
    loss_u = torch.nn.functional.cross_entropy(output["logit_u_list"][0], index)
    result = criterion(model(waves), labels, model.logits, 0.7, 10.0)
    torch.testing.assert_close(result.prediction_loss, loss_m.detach())
    expected = 0.7 * loss_m + 0.3 * loss_u + 10.0 * output["features_pen"]
    torch.testing.assert_close(result.loss, expected)


def test_wavlm_gives_the_hidden_states_of_s3prls_class():
    torch.manual_seed(4)
    model = MaskedPredictor("wavlm", TINY, 8).eval()
    waves = 0.1 * torch.randn(2, sample_count(40))
    np.random.seed(5)
    expected, _ = model.backbone.extract_features(waves, mask=True)
    np.random.seed(5)
    encoded = model(waves)
    torch.testing.assert_close(encoded.hidden, expected)
    assert 0.3 < float(encoded.masked.float().mean()) < 0.8
    assert model.logits(encoded.hidden[0]).shape == (40, 8)
    assert model.logits(encoded.hidden[0]).abs().max() <= 10.0001  # cosine over 0.1


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_random_layers_keep_the_spread_of_frames(family, speech):
    """With PyTorch's initialisation, the last layer of six has half of the spread of the first,
    and training soon collapses."""
    torch.manual_seed(12)
    model = MaskedPredictor(family, recipes.TeacherRecipe(), 8).eval()
    wave = read_audio(speech.train[-1].path)[None]
    spreads = []
    with torch.no_grad():
        for index in (1, 6):
            hidden, _ = model.backbone.extract_features(wave, mask=False, output_layer=index)
            spreads.append(float(spread(hidden)))
    assert spreads[1] > 0.9 * spreads[0] > 0


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_bfloat16_runs_and_is_close(family):
    torch.manual_seed(6)
    model = MaskedPredictor(family, TINY, 8).eval()
    waves = 0.1 * torch.randn(2, sample_count(30))
    labels = torch.randint(8, (2, 30))
    losses = []
    # Without oneDNN, which is wrong here on CPUs with AMX: see distill/positions.py.
    with torch.backends.mkldnn.flags(enabled=False):
        for enabled in (False, True):
            np.random.seed(7)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                encoded = model(waves)
            losses.append(criterion(encoded, labels, model.logits, 1.0, 10.0).loss)
        losses[1].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    values = [float(loss.detach()) for loss in losses]
    assert values[1] == pytest.approx(values[0], rel=0.05)


def test_criterion_against_loops():
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(2, 5, 3, generator=generator)
    labels = torch.randint(4, (2, 5), generator=generator)
    masked = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]]).bool()
    table = torch.randn(3, 4, generator=generator)
    sums, counts, correct = {True: 0.0, False: 0.0}, {True: 0, False: 0}, 0
    for b in range(2):
        for t in range(5):
            scores = [sum(float(hidden[b, t, d] * table[d, k]) for d in range(3)) for k in range(4)]
            label, is_masked = int(labels[b, t]), bool(masked[b, t])
            sums[is_masked] += math.log(sum(math.exp(s) for s in scores)) - scores[label]
            counts[is_masked] += 1
            correct += is_masked and scores.index(max(scores)) == label
    encoded = EncodedBatch(hidden, masked, torch.tensor(0.02))
    result = criterion(encoded, labels, lambda x: x @ table, 0.6, 10.0)
    expected = 0.6 * sums[True] / counts[True] + 0.4 * sums[False] / counts[False] + 0.2
    assert float(result.loss) == pytest.approx(expected, rel=1e-5)
    assert float(result.prediction_loss) == pytest.approx(sums[True] / counts[True], rel=1e-5)
    assert float(result.accuracy) == pytest.approx(correct / 5)
    assert result.predictions == 5
    rows = [[float(hidden[b, t, d]) for d in range(3)] for b in range(2) for t in range(5)]
    means = [sum(row[d] for row in rows) / 10 for d in range(3)]
    power = sum(x * x for row in rows for x in row) / 10
    constant = sum(mean * mean for mean in means)
    assert float(result.spread) == pytest.approx((power - constant) / power, rel=1e-5)
    masked_only = criterion(encoded, labels, lambda x: x @ table, 1.0, 0.0)
    assert float(masked_only.loss) == pytest.approx(sums[True] / counts[True], rel=1e-5)


# --- units


@pytest.mark.parametrize("samples", [400, 719, 720, 16000, 16399, 16400])
def test_frame_counts_are_those_of_the_extractor(samples):
    model = MaskedPredictor("hubert", TINY, 2).eval()
    with torch.no_grad():
        frames = model.backbone.feature_extractor(torch.randn(1, samples)).shape[-1]
    assert frame_count(samples) == frames
    assert frame_count(sample_count(frames)) == frames
    assert frame_count(sample_count(frames) - 1) == frames - 1
    assert mfcc(torch.randn(samples)).shape == (frames, 39)


def test_mfcc_frames_cover_the_samples_of_the_extractors_frames():
    wave = 0.1 * torch.randn(16000, generator=torch.Generator().manual_seed(9))
    other = wave.clone()
    other[5000] += 0.5
    changed = (mfcc(wave) - mfcc(other))[:, :13].abs().amax(1) > 1e-6
    covering = [t for t in range(frame_count(16000)) if 320 * t <= 5000 < 320 * t + 400]
    assert changed.nonzero().flatten().tolist() == covering == [15]


def test_two_tones_get_two_units(tmp_path):
    """Half a second of 300 Hz and half a second of 2000 Hz, alternating."""
    time = np.arange(8000) / 16000
    low, high = (0.1 * np.sin(2 * np.pi * hertz * time) for hertz in (300, 2000))
    rng = np.random.default_rng(0)
    utterances = []
    for number, parts in enumerate(([low, high, low], [high, low, high])):
        path = tmp_path / f"{number}.flac"
        sound = np.concatenate(parts) + 1e-3 * rng.standard_normal(24000)
        soundfile.write(path, sound, 16000)
        utterances.append(CorpusUtterance(path.name, str(path), 24000))
    labels = make_labels(Corpus((utterances[0],), (utterances[1],)), mfcc, 2, 1000, 1, "tones")
    first, second = labels.of_utterance(0), labels.of_utterance(1)
    assert len(first) == len(second) == 74
    # frame t covers [320 t, 320 t + 400); the differences cover 4 frames of 10 ms more
    inside = [slice(3, 21), slice(28, 46), slice(53, 71)]
    a, b = first[10], first[35]
    assert {a, b} == {0, 1}
    for part, unit in zip(inside, (a, b, a), strict=True):
        assert (first[part] == unit).all() and (second[part] == 1 - unit).all()


# --- batches


def fake_utterances(lengths: list[int]) -> list[CorpusUtterance]:
    return [CorpusUtterance(f"0/{i}", f"{i}", length) for i, length in enumerate(lengths)]


def test_an_epoch_has_each_utterance_once_in_batches_of_limited_size():
    rng = random.Random(1)
    utterances = fake_utterances([rng.randint(8000, 300_000) for _ in range(200)])
    first = epoch_batches(utterances, 20.0, 8.0, 1, 0)
    indices = [index for batch in first for index, _ in batch.excerpts]
    assert sorted(indices) == list(range(200))
    for batch in first:
        assert batch.seconds <= 20.0 and batch.frames % 2 == 0
        assert sample_count(batch.frames) <= 8 * 16000
        for index, start in batch.excerpts:
            assert 0 <= 320 * start <= utterances[index].length - sample_count(batch.frames)
    seconds = sum(batch.seconds for batch in first)
    assert seconds > 0.85 * sum(min(u.length, 128_000) for u in utterances) / 16000
    assert first == epoch_batches(utterances, 20.0, 8.0, 1, 0)
    next_epoch = epoch_batches(utterances, 20.0, 8.0, 1, 1)
    assert first != next_epoch
    assert first != epoch_batches(utterances, 20.0, 8.0, 2, 0)
    stream = iter(EndlessBatchSampler(utterances, 20.0, 8.0, 1, 0, len(first) - 2))
    assert [next(stream) for _ in range(4)] == first[-2:] + next_epoch[:2]


def test_labels_match_the_samples_of_their_excerpt(speech, zoo):
    """The label of each frame is its index, which gives the excerpt's position in the file."""
    counts = [frame_count(u.length) for u in speech.all]
    flat = np.concatenate([np.arange(n) for n in counts]).astype(np.uint16)
    labels = FrameLabels(flat, np.cumsum([0, *counts]), np.zeros((200, 1)))
    recipe = dataclasses.replace(TINY, crop_seconds=0.6)
    begins = set()
    excerpts = ExcerptDataset(speech.train, labels, 0, "clean", recipe, zoo / "noise")
    for batch in epoch_batches(speech.train, 3.0, 0.6, 1, 0):
        _, waves, targets = excerpts[batch]
        for (index, _), wave, target in zip(batch.excerpts, waves, targets, strict=True):
            full, begin = read_audio(speech.train[index].path), int(target[0])
            assert torch.equal(target, torch.arange(begin, begin + batch.frames))
            assert torch.equal(wave, full[320 * begin : 320 * begin + sample_count(batch.frames)])
            begins.add(begin)
    assert len(begins) > 3
    dev = ExcerptDataset(speech.dev, labels, len(speech.train), "distorted", recipe, zoo / "noise")
    (batch,) = epoch_batches(speech.dev, 3.0, 0.6, 1, -1)
    _, waves, targets = dev[batch]
    begin = int(targets[0, 0])
    clean = read_audio(speech.dev[0].path)[320 * begin :][: waves.shape[1]]
    assert waves.shape == (1, len(clean)) and not torch.equal(waves[0], clean)
    assert torch.equal(dev[batch][1], waves)


def test_mixing_has_the_given_ratio_and_covers_at_most_half():
    generator = torch.Generator().manual_seed(10)
    wave, other = torch.randn(2, 4000, generator=generator) * torch.tensor([[0.1], [0.7]])
    mixed = mix_over(wave, other, 6.0, 1000, 300, 800)
    added = mixed - wave
    assert (added[:1000] == 0).all() and (added[1800:] == 0).all()
    scale = added[1000:1800] / other[300:1100]
    power = 10 * math.log10(wave.square().mean() / (scale.median() * other).square().mean())
    assert power == pytest.approx(6.0, abs=1e-2)
    assert scale.std() < 1e-4
    waves = torch.randn(400, 2000, generator=generator)
    noises = [torch.full((3000,), 0.5)]
    draw = [random.Random(i) for i in range(400)]
    mixed = mix_batch(waves, copy.deepcopy(draw), noises, 0.3, 0.25)
    assert torch.equal(mixed, mix_batch(waves, draw, noises, 0.3, 0.25))
    changed = [(m != w).nonzero().flatten() for m, w in zip(mixed, waves, strict=True)]
    changed = [(i, samples) for i, samples in enumerate(changed) if len(samples)]
    assert 85 < len(changed) < 155  # 120 expected, standard deviation 9
    assert max(int(s[-1] - s[0]) + 1 for _, s in changed) <= 1000
    added = [(mixed[i] - waves[i])[samples] for i, samples in changed if len(samples) > 30]
    constant = sum(float(signal.std()) < 1e-4 for signal in added)
    assert 0.1 < constant / len(added) < 0.4  # a quarter got the (constant) noise


# --- runs


def test_an_interrupted_run_resumes_bit_for_bit(zoo, speech, tmp_path, monkeypatch):
    """Stopped every four steps, with a loader worker, and with random draws in between."""
    monkeypatch.setattr(curves, "_draw", lambda *_: None)  # slow, and has its own test
    shutil.copytree(zoo / "noise", tmp_path / "noise")
    steps, runs, files = 0, 0, None
    options = dataclasses.replace(OPTIONS, workers=1)

    def stop(step: int) -> bool:
        nonlocal steps
        steps += 1
        return steps % 4 == 0

    while files is None:
        files = make_zoo(recipes.TEACHERS, speech, TINY, tmp_path, options, stop)
        runs += 1
        torch.rand(runs), np.random.rand(runs), random.random()
        assert runs < 12
    # steps of the stages: 3, 6, 6, 6, 6, 4, 3, 2; stop is not called after the last step of a stage
    assert steps == 2 + 5 + 5 + 5 + 5 + 3 + 2 + 1 and runs == 1 + steps // 4
    for name in STAGES:
        expected, resumed = weights(zoo, name), weights(tmp_path, name)
        assert expected.keys() == resumed.keys()
        assert all(torch.equal(expected[key], resumed[key]) for key in expected), name
        logs = [json.loads((z / name / "log.json").read_text())["points"] for z in (zoo, tmp_path)]
        for point in logs[0] + logs[1]:
            del point["audio_seconds_per_second"]
        assert logs[0] == logs[1]
    for stage in recipes.STAGES.values():
        if stage.file:
            assert (zoo / stage.file).read_bytes() == (tmp_path / stage.file).read_bytes()


def test_a_finished_zoo_is_not_changed(zoo, speech):
    before = {p: p.stat().st_mtime_ns for p in zoo.rglob("checkpoint.pt")}
    assert make_zoo(("wavlm",), speech, TINY, zoo, OPTIONS) == {"wavlm": zoo / "tiny_wavlm.pt"}
    assert before == {p: p.stat().st_mtime_ns for p in zoo.rglob("checkpoint.pt")}


def test_the_loss_falls(speech, tmp_path):
    """Tones follow one another in a fixed order, so masked frames can be predicted."""
    rng = np.random.default_rng(11)
    time = np.arange(3200) / 16000
    utterances = []
    for number in range(8):
        hertz = np.roll([300, 600, 1200, 2400], number)
        parts = [0.1 * np.sin(2 * np.pi * h * time) for h in np.tile(hertz, 2)]
        path = tmp_path / f"{number}.flac"
        sound = np.concatenate(parts) + 1e-3 * rng.standard_normal(25600)
        soundfile.write(path, sound, 16000)
        utterances.append(CorpusUtterance(path.name, str(path), 25600))
    corpus = Corpus(tuple(utterances[:6]), tuple(utterances[6:]))
    labels = make_labels(corpus, mfcc, 4, 1000, 1, "tones")
    # half of hubert's steps; short masks, so that each masked frame has unmasked neighbours
    recipe = dataclasses.replace(
        TINY, steps=120, batch_seconds=5.0, lr=5e-3, mask_length=2, mask_prob=0.3
    )
    stage = recipes.STAGES["hubert_1"]
    options = TrainingOptions(log_every=60, dev_every=60)
    assert train(stage, recipe, corpus, labels, tmp_path, options) is not None
    log = json.loads((tmp_path / "hubert_1/log.json").read_text())
    assert log["points"][-1]["dev_prediction_loss"] < 0.7 * log["floor_loss"]
    assert log["points"][-1]["dev_accuracy"] > log["floor_accuracy"] + 0.2


def test_stages_that_a_teacher_depends_on():
    names = [[s.name for s in recipes.required_stages((t,))] for t in recipes.TEACHERS]
    assert names == [
        ["hubert_1", "hubert"],
        ["hubert_1", "hubert", "robust_hubert"],
        ["hubert_1", "wavlm"],
        ["hubert_1", "hubert", "hubert_3"],
        ["prosody"],
        ["hubert_1", "hubert", "robust_hubert", "speaker"],
        ["hubert_1", "hubert", "robust_hubert", "phones"],
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, stage in SHIPPED_STAGES.items():
            patch.setitem(recipes.STAGES, name, stage)
            assert [s.name for s in recipes.required_stages((name,))] == [name]


def test_the_speaker_teacher_keeps_its_extractor_and_trains_its_layers(zoo):
    start, end = weights(zoo, "robust_hubert"), weights(zoo, "speaker")
    conv = [name for name in end if "feature_extractor" in name]
    layers = [name for name in end if "encoder.layers.0" in name and "weight" in name]
    assert conv and all(torch.equal(start[name], end[name]) for name in conv)
    assert layers and not any(torch.equal(start[name], end[name]) for name in layers)


def test_a_shipped_teacher_starts_a_stage_of_the_default_size():
    recipe = recipes.TeacherRecipe()
    model = MaskedPredictor("hubert", recipe, 1)
    head = model.backbone.final_proj.weight.clone()
    checkpoint.load_shipped("tiny_robust_hubert", model)
    wave = torch.randn(8000, generator=torch.Generator().manual_seed(0))
    expert = load_upstream("tiny_robust_hubert", "x").eval()
    with torch.no_grad():
        expected = expert([wave])["hidden_states"][3][0]
        torch.testing.assert_close(model.eval().layer(wave, 3), expected)
    assert torch.equal(model.backbone.final_proj.weight, head)
    with pytest.raises(CheckpointError, match="another size"):
        checkpoint.load_shipped("tiny_robust_hubert", MaskedPredictor("hubert", TINY, 1))


def test_pairs_are_two_distorted_excerpts_of_one_utterance(zoo, speech):
    batch = next(iter(epoch_batches(speech.train, 3.0, 0.6, 1, 0)))
    dataset = PairDataset(speech.train, TINY, zoo / "noise")
    _, waves, partners = dataset[batch]
    count = len(batch.excerpts)
    assert waves.shape == (2 * count, sample_count(batch.frames))
    assert partners.tolist() == [(i + count) % (2 * count) for i in range(2 * count)]
    assert not torch.equal(waves[:count], waves[count:])
    _, again, _ = PairDataset(speech.train, TINY, zoo / "noise")[batch]
    assert torch.equal(waves, again)  # draws depend on seed, epoch and utterance only


def test_the_loss_of_pairs_is_that_of_simclr_in_loops():
    torch.manual_seed(0)
    embeddings = torch.randn(6, 5)
    partners = torch.tensor([3, 4, 5, 0, 1, 2])
    losses = []
    for i in range(6):
        scores = [
            math.exp(torch.cosine_similarity(embeddings[i], embeddings[j], dim=0).item() / 0.1)
            for j in range(6)
        ]
        others = sum(score for j, score in enumerate(scores) if j != i)
        losses.append(-math.log(scores[int(partners[i])] / others))
    result = pair_criterion(torch.randn(6, 4, 3), embeddings, partners, torch.tensor(2.0), 10.0)
    assert float(result.prediction_loss) == pytest.approx(np.mean(losses), rel=1e-4)
    assert float(result.loss) == pytest.approx(np.mean(losses) + 20, rel=1e-4)
    assert pair_baseline(recipes.TeacherRecipe()) == (math.log(31), 1 / 31)


def test_a_frame_has_the_phone_at_its_middle():
    # Frames of 400 samples, one every 320: their middles are at 200, 520, 840, 1160 and 1480.
    segments = (Segment("B", 520, 840), Segment("A", 840, 1161), Segment("SIL", 1161, 2000))
    utterance = CorpusUtterance("k", "a.flac", 1680, segments)
    labels = phone_labels(Corpus((utterance, utterance), ()))
    assert labels.flat.tolist() == 2 * [0, 2, 1, 1, 0] and labels.classes == 3
    with pytest.raises(DataError, match=r"b\.flac has no segments"):
        phone_labels(Corpus((utterance,), (CorpusUtterance("l", "b.flac", 1680),)))


def test_prosody_follows_pitch_and_loudness():
    time = np.arange(16_000) / 16_000
    low, high = (
        sum(np.sin(2 * np.pi * hertz * n * time) / n for n in range(1, 8)) for hertz in (120, 180)
    )
    wave = torch.from_numpy(np.concatenate([0.3 * low, 0.03 * high])).float()
    values = prosody(wave)
    assert values.shape == (frame_count(len(wave)), 4)
    first, second = values[10:40].mean(0), values[60:90].mean(0)
    # a fifth more, in units of half an octave; a tenth of the amplitude is -2 bels
    assert float(second[0] - first[0]) == pytest.approx(2 * math.log2(1.5), abs=0.1)
    assert float(second[1] - first[1]) == pytest.approx(-2, abs=0.1)
    assert float(values[:, 2].abs().argmax()) == pytest.approx(50, abs=8)


# --- errors


def test_a_changed_recipe_or_corpus_is_an_error(zoo, speech):
    with pytest.raises(ConfigError, match=r"\brecipe\.lr\b.*0\.001.*0\.5"):
        make_zoo(("hubert",), speech, dataclasses.replace(TINY, lr=0.5), zoo, OPTIONS)
    fewer = Corpus(speech.train[1:], speech.dev)
    with pytest.raises(ConfigError, match=r"\bcorpus \("):
        make_zoo(("hubert",), fewer, TINY, zoo, OPTIONS)


def test_a_damaged_file_is_named(zoo, speech, tmp_path):
    broken = {"units-mfcc.npz": DataError, "hubert_1/checkpoint.pt": CheckpointError}
    for name, error in broken.items():
        folder = tmp_path / Path(name).stem
        (folder / "hubert_1").mkdir(parents=True)
        for file in ("recipe.json", *broken):
            (folder / file).write_bytes((zoo / file).read_bytes())
        (folder / name).write_bytes((zoo / name).read_bytes()[:-300])
        with pytest.raises(error, match=Path(name).name):
            make_zoo(("hubert",), speech, TINY, folder, OPTIONS)


def test_an_invalid_option_or_input_is_one_line(corpus, tmp_path, capsys):
    audio, out = str(corpus / "audio"), str(tmp_path / "zoo")
    (tmp_path / "empty").mkdir()
    (tmp_path / "m.tsv").write_text("path\tsplit\nu0.flac\ttrain\n")
    (tmp_path / "file").write_text("")
    cases = [
        ([str(tmp_path / "no")], str(tmp_path / "no")),
        ([str(tmp_path / "empty")], str(tmp_path / "empty")),
        ([audio, "--manifest", str(tmp_path / "m.tsv")], str(tmp_path / "m.tsv")),
        ([audio, "--steps", "0"], r"\bsteps .*\b0$"),
        ([audio, "--batch-seconds", "inf"], r"\bbatch_seconds .*\binf$"),
        ([audio, "--seed", "-1"], r"\bseed .*-1$"),
        ([audio, "--hidden-clusters", "0"], r"\bhidden_clusters .*\b2\b.*\b0$"),
        ([audio, "--crop-seconds", "0.1"], r"\bcrop_seconds .*\b0\.5\b.*\b0\.1$"),
        ([audio, "--device", "abacus"], r"--device abacus\b"),
        ([audio, "--mfcc-clusters", "5000"], r"\b5000\b"),
    ]
    for argv, pattern in cases:
        assert tool.main([*argv, "-o", out]) == 2, argv
        errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert len(errors) == 1 and re.search(pattern, errors[0]), errors
    assert tool.main([audio, "-o", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_manifest_selects_utterances_and_splits(corpus, tmp_path):
    for i in range(4):
        (tmp_path / f"u{i}.flac").write_bytes((corpus / f"audio/u{i}.flac").read_bytes())
    rows = ["path\tsplit\tsegments", "u3.flac\ttrain\tA:5+2", "u0.flac\tdev\t", "u1.flac\ttest\t"]
    (tmp_path / "m.tsv").write_text("\n".join(rows) + "\n")
    result = read_corpus([corpus / "audio", tmp_path], [tmp_path / "m.tsv"], 8000)
    assert [u.key for u in result.train if u.key.startswith("1/")] == ["1/u3.flac"]
    assert [u.key for u in result.dev if u.key.startswith("1/")] == ["1/u0.flac"]
    assert sum(u.key.startswith("0/") for u in result.all) == 12
    assert {u.segments for u in result.all} == {(), (Segment("A", 800, 1120),)}
    with pytest.raises(DataError, match=r"\bdev\b.*\b0\.5625 s"):
        read_corpus([tmp_path], [tmp_path / "m.tsv"], 9000)  # u0 has 8000 samples


def test_the_command_stops_after_minutes_and_resumes(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recipes, "TeacherRecipe", lambda: TINY)
    argv = [str(corpus / "audio"), "-o", str(tmp_path / "z"), "--teacher", "hubert"]
    argv += ["--device", "cpu"]
    assert tool.main([*argv, "--minutes", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert (tmp_path / "z/hubert_1/checkpoint.pt").exists()
    assert not (tmp_path / "z/tiny_hubert.pt").exists()
    assert tool.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "z/tiny_hubert.pt")
