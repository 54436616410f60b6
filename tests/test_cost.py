"""`s3prl-ekd cost`: parameters and MACs against counts by hand and against SUPERB's figures."""

from __future__ import annotations

import json
import random
import re

import pytest
import soundfile
import torch
from s3prl_ekd.upstream.expert import UpstreamExpert
from torch import nn

from s3prl_ekd import cli
from s3prl_ekd.distill.aggregation import TargetSpec
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.errors import DataError
from s3prl_ekd.student_file import LoadedStudent, write_student
from s3prl_ekd.superb.cost import LENGTHS, librispeech_lengths, measure_cost, unused_parameters
from s3prl_ekd.superb.macs import count_macs

from .conftest import STUDENT, error_of

# The tiny student: 7 conv layers of 32 channels, width 48, feed-forward 64, 4 attention heads, a
# positional convolution of kernel 16 in 4 groups, 2 layers.
BACKBONE = (
    1 * 32 * 10 + 4 * 32 * 32 * 3 + 2 * 32 * 32 * 2  # convolutions without biases: 16,704
    + 2 * 32  # the first one's normalisation
    + 32 * 48 + 48  # projection: 1,584
    + 48 * (48 // 4) * 16 + 16 + 48  # positional convolution, with weight norm's magnitudes: 9,280
    + 2 * 48  # layer norm
    + 2 * (  # layers, 15,856 each
        4 * (48 * 48 + 48)  # query, key, value, out
        + 48 * 64 + 64 + 64 * 48 + 48  # feed-forward
        + 2 * 2 * 48  # two layer norms
    )
)  # fmt: skip
# A head that predicts 2 layers: 48 -> 2 * 48 for both, then 48 -> 48 for each.
HEAD = 48 * 96 + 96 + 2 * (48 * 48 + 48)
# GMACs on SUPERB's leaderboard; their sum is 1669.156 up to rounding.
HUBERT_BASE = {"short": 149.255, "medium": 261.280, "long": 422.366, "longer": 836.254}


def products_of(samples: int) -> int:
    """MACs of the tiny student's convolutions and matrix products, without heads."""
    total, frames, channels = 0, samples, 1
    for kernel, stride in [(10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2]:
        frames = (frames - kernel) // stride + 1
        total += frames * 32 * channels * kernel
        channels = 32
    total += frames * 32 * 48  # projection
    total += (frames + 1) * 48 * 12 * 16  # an even kernel adds a frame, which is removed
    layer = 4 * frames * 48 * 48  # query, key, value, out
    layer += 2 * frames * frames * 48  # scores, mixing
    layer += 2 * frames * 48 * 64  # feed-forward
    return total + 2 * layer


def attention_of(samples: int, dropout: bool) -> int:
    """The other MACs of the tiny student's two attention layers; see superb/macs.py."""
    frames = (samples - 400) // 320 + 1
    layer = 3 * frames * 48 + frames * 48  # biases of query, key, value; the scale of the query
    layer += 4 * frames * frames * (4 if dropout else 3)  # mask, softmax (2), dropout
    return 2 * layer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """``heads.pt``, a student with a head, and ``package/``, exported from it without the head."""
    folder = tmp_path_factory.mktemp("cost")
    torch.manual_seed(1)
    student = Student(StudentSettings(**STUDENT))
    targets = {"hubert": TargetSpec(2, (48,))}
    heads = PredictionHeads(student.width, targets)
    write_student(LoadedStudent(student, heads, targets, {"step": 1}), folder / "heads.pt")
    argv = [str(folder / "heads.pt"), "-o", str(folder / "package"), "--heads", "drop"]
    assert cli.main(["export", "superb", *argv]) == 0
    return folder


# --- by hand


def test_the_sums_by_hand():
    assert (BACKBONE, HEAD) == (59_440, 9_408)
    # 16,000 samples are 3,199, 1,599, 799, 399, 199, 99, 49 frames:
    # 1,023,680 + 2,996 * 3,072 + 148 * 2,048 + 75,264 + 460,800 + 2 * 983,136
    assert products_of(16_000) == 13_032_832
    assert attention_of(16_000, dropout=False) == 2 * (7_056 + 2_352 + 3 * 9_604) == 76_440


@pytest.mark.parametrize("dropout", [False, True])
def test_a_student(student_settings, dropout):
    """Two lengths, with an odd and an even number of frames.

    Dropout is counted in eval mode too, as by SUPERB's profiler.
    """
    settings = StudentSettings(**STUDENT) if dropout else student_settings
    student = Student(settings).eval()
    module = WithForward(
        student, lambda waves: student(waves[0][None], torch.tensor([len(waves[0])]))
    )
    cost = measure_cost(module, {"a": [16_000], "b": [16_400, 16_000]})
    assert (cost["parameters"], cost["unused"], cost["utterances"]) == (BACKBONE, 0, 3)
    one, two = (products_of(n) + attention_of(n, dropout) for n in (16_000, 16_400))
    assert cost["macs_buckets"] == {"a": one, "b": one + two} and cost["macs"] == 2 * one + two
    assert cost["macs_products"] == 2 * products_of(16_000) + products_of(16_400)


class WithForward(nn.Module):
    """A student as an upstream."""

    def __init__(self, model, run):
        super().__init__()
        self.model, self.run = model, run

    def forward(self, waves):
        return {"hidden_states": self.run(waves).hidden_states}


def test_products_by_hand():
    """Including operators whose products torch's flop counter does not see."""
    x = torch.randn(2, 5, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    cases = {
        "linear": (lambda: nn.Linear(8, 3)(x), 2 * 5 * 8 * 3),
        "einsum": (lambda: torch.einsum("bfd,de->bfe", x, torch.randn(8, 4)), 2 * 5 * 8 * 4),
        "grouped": (lambda: nn.Conv1d(8, 6, 3, groups=2)(x.mT), 2 * 3 * 6 * 4 * 3),
        "strided": (lambda: nn.Conv1d(8, 6, 3, stride=2)(x.mT), 2 * 2 * 6 * 8 * 3),
        # two directions, four gates, from the input and the previous state
        "lstm": (
            lambda: nn.LSTM(8, 4, bidirectional=True, batch_first=True)(x),
            2 * 2 * 5 * 4 * 4 * (8 + 4),
        ),
        "vector": (lambda: torch.randn(3, 7) @ torch.randn(7), 3 * 7),
        "attention": (lambda: attention(x, x, x)[0], 4 * 2 * 5 * 8 * 8 + 2 * 2 * 5 * 5 * 8),
        "sum": (lambda: x.sum() + x.softmax(-1).mean(), 0),
    }
    for name, (run, expected) in cases.items():
        with count_macs() as macs:
            run()
        assert macs.products == expected, name
    assert macs.attention == 0


# --- HuBERT Base against SUPERB's leaderboard


@pytest.fixture(scope="module")
def hubert_base():
    """s3prl's model with random weights, with the forward of its upstream."""
    from s3prl.upstream.hubert.hubert_model import (
        HubertConfig,
        HubertModel,
        HubertPretrainingConfig,
    )

    config = HubertConfig(label_rate=50, final_dim=256, untie_final_proj=True)
    task = HubertPretrainingConfig(label_rate=50, sample_rate=16_000)
    labels = [str(label) for label in range(504)]  # 500 units and 4 special symbols
    model = HubertModel(config, task, [labels])

    class Upstream(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, waves):
            padded = nn.utils.rnn.pad_sequence(waves, batch_first=True)
            padding = torch.zeros_like(padded, dtype=torch.bool)
            last, _ = self.model.extract_features(padded, padding_mask=padding, mask=None)
            return {"hidden_states": [last]}

    return Upstream().eval()


def macs_on_meta(module, buckets) -> dict[str, int]:
    """MACs of each bucket, without any computation."""
    module.to("meta")
    totals = {}
    for bucket in buckets:
        totals[bucket] = 0
        for samples in LENGTHS[bucket]:
            with count_macs() as macs:
                module([torch.zeros(samples, device="meta")])
            totals[bucket] += macs.total
    return totals


def test_hubert_base_parameters(hubert_base):
    cost = measure_cost(hubert_base, {"a": [4000]})
    assert cost["parameters"] == 94_697_600
    # used in pretraining only: mask embedding, projection to 256, embeddings of 504 labels
    assert cost["unused"] == 768 + (768 * 256 + 256) + 504 * 256


def test_hubert_base_macs(hubert_base):
    """s3prl's model pads to an even number of frames; without this padding the figures equal the
    leaderboard's to the last digit (checked for one bucket, to save time)."""
    totals = macs_on_meta(hubert_base, LENGTHS)
    for bucket, expected in HUBERT_BASE.items():
        assert totals[bucket] / 1e9 == pytest.approx(expected, rel=0.005)
    assert sum(totals.values()) / 1e9 == pytest.approx(1669.156, rel=0.005)
    encoder = hubert_base.model.encoder
    assert encoder.required_seq_len_multiple == 2
    encoder.required_seq_len_multiple = 1
    exact = macs_on_meta(hubert_base, ["short"])
    assert round(exact["short"] / 1e9, 3) == HUBERT_BASE["short"]


# --- unused parameters


class UnusualModule(nn.Module):
    """Parameters that are used in unusual ways, and unused ones."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 4))
        self.norm = nn.LayerNorm(4)  # the sum of its output is constant
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.hidden = nn.Parameter(torch.ones(4))  # used under no_grad
        self.head = nn.Linear(4, 2)
        self.never = nn.Parameter(torch.ones(3))
        self.dead = nn.Parameter(torch.ones(4))  # multiplied by 0

    def forward(self, waves):
        x = nn.utils.rnn.pad_sequence(waves, batch_first=True)[:, :8, None]
        x = self.norm(x @ self.weight + torch.arange(4.0) * x) * self.frozen + 0 * self.dead
        with torch.no_grad():
            offset = self.hidden * 2
        self.head(x)
        return {"hidden_states": [x + offset]}


def test_unused_parameters_and_the_module_is_restored():
    module = UnusualModule().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    flags = {name: value.requires_grad for name, value in module.named_parameters()}
    unused = unused_parameters(module, lambda waves: module(waves)["hidden_states"])
    assert sorted(unused) == ["dead", "head.bias", "head.weight", "never"]
    assert module.training
    assert flags == {name: value.requires_grad for name, value in module.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(value.grad is None for value in module.parameters())


def test_heads_are_unused_unless_their_outputs_are_hidden_states(files):
    upstream = UpstreamExpert(files / "heads.pt")
    for selection, unused in (("hidden_states", HEAD), ("hidden_states_and_heads", 0)):
        cost = measure_cost(upstream, {"a": [4000]}, selection)
        assert (cost["parameters"], cost["unused"]) == (BACKBONE + HEAD, unused)


# --- the command


def run(*argv) -> int:
    return cli.main(["cost", *map(str, argv)])


@pytest.fixture(scope="module")
def librispeech(tmp_path_factory):
    """A folder with test-clean's layout and number of files.

    32 have the published lengths, the rest lengths between them. All are symlinks, in random order.
    """
    root = tmp_path_factory.mktemp("LibriSpeech")
    (root / "sounds").mkdir()
    published = [n for lengths in LENGTHS.values() for n in lengths]
    sources = []
    for i, samples in enumerate(published):
        for extra, copies in ((0, 1), (80, 81 if i < 31 else 77)):
            path = root / "sounds" / f"{samples + extra}.flac"
            soundfile.write(path, torch.zeros(samples + extra).numpy(), 16_000)
            sources += [path] * copies
    assert len(sources) == 2620
    random.Random(0).shuffle(sources)
    for i, source in enumerate(sources):
        chapter = root / "test-clean" / str(1000 + i % 40) / str(i % 7)
        chapter.mkdir(parents=True, exist_ok=True)
        (chapter / f"{1000 + i % 40}-{i % 7}-{i:04d}.flac").symlink_to(source)
    return root


def test_a_package_and_librispeechs_lengths(files, librispeech, capsys):
    assert {k: list(v) for k, v in LENGTHS.items()} == librispeech_lengths(librispeech)
    out = files / "cost.json"
    assert run(files / "package", "--librispeech", librispeech, "-o", out) == 0
    output = capsys.readouterr().out
    cost = json.loads(out.read_text())
    assert (cost["parameters"], cost["unused"], cost["utterances"]) == (BACKBONE, 0, 32)
    for bucket, lengths in LENGTHS.items():
        expected = sum(products_of(n) + attention_of(n, dropout=True) for n in lengths)
        assert cost["macs_buckets"][bucket] == expected
    assert cost["macs"] == sum(cost["macs_buckets"].values())
    assert "59,440\n" in output and f"{cost['macs'] / 1e9:,.3f} G" in output


def test_an_upstream(files, capsys):
    """The same figures with -u, on the published lengths; the head runs only if it is selected."""
    out = files / "upstream.json"
    assert run("-u", "ekd_student", "-k", files / "heads.pt", "-o", out) == 0
    assert re.search(r"\b68,848\b.*\b9,408\b.*unused", capsys.readouterr().out)
    cost = json.loads(out.read_text())
    lengths = [n for many in LENGTHS.values() for n in many]
    total = sum(products_of(n) + attention_of(n, True) for n in lengths)
    assert cost["macs"] == total
    argv = ("-k", files / "heads.pt", "-s", "hidden_states_and_heads", "-o", out)
    assert run("-u", "ekd_student", *argv) == 0
    head = sum(((n - 400) // 320 + 1) * (48 * 96 + 2 * 48 * 48) for n in lengths)
    with_head = json.loads(out.read_text())
    assert (with_head["macs"], with_head["unused"]) == (total + head, 0)
    assert run("-u", "fbank") == 0
    assert re.search(r"^parameters +0$", capsys.readouterr().out, re.MULTILINE)


def test_only_a_report_of_the_command_is_replaced(tmp_path, capsys):
    out = tmp_path / "cost.json"
    out.write_text('{"mine": 1}')
    assert str(out) in error_of(capsys, "cost", "-u", "fbank", "-o", out)
    assert out.read_text() == '{"mine": 1}'
    out.unlink()
    for _ in range(2):
        assert run("-u", "fbank", "-o", out) == 0


def test_errors(files, tmp_path, capsys):
    assert re.search("PACKAGE_DIR.*-u NAME", error_of(capsys, "cost"))
    package = files / "package"
    assert re.search("PACKAGE_DIR.*-u NAME", error_of(capsys, "cost", package, "-u", "fbank"))
    assert re.search("-k .*-u", error_of(capsys, "cost", package, "-k", files / "heads.pt"))
    assert re.search("-s .*-u", error_of(capsys, "cost", package, "-s", "PR"))
    assert str(tmp_path / "nothing") in error_of(capsys, "cost", tmp_path / "nothing")
    assert re.search(rf"{tmp_path}.*expert\.py", error_of(capsys, "cost", tmp_path))
    (tmp_path / "expert.py").write_text("import numpy\nraise ValueError('not today')\n")
    assert re.search(rf"{tmp_path}.*model\.pt", error_of(capsys, "cost", tmp_path))
    (tmp_path / "model.pt").write_bytes((package / "model.pt").read_bytes())
    assert re.search(
        r"ValueError: not today.*expert\.py.*\b2\b", error_of(capsys, "cost", tmp_path)
    )
    assert re.search(r"\bfbnak\b", error_of(capsys, "cost", "-u", "fbnak"))
    nothing = tmp_path / "nothing.pt"
    assert str(nothing) in error_of(capsys, "cost", "-u", "ekd_student", "-k", nothing)
    student = ("-u", "ekd_student", "-k", files / "heads.pt")
    error = error_of(capsys, "cost", *student, "-s", "heads")
    assert re.search(r"ekd_student.*\bheads\b.*hidden_states", error)
    corpus = tmp_path / "nothing"
    assert str(corpus) in error_of(capsys, "cost", *student, "--librispeech", corpus)
    out = tmp_path / "expert.py" / "cost.json"  # below a file
    assert str(out.parent) in error_of(capsys, "cost", "-u", "fbank", "-o", out)


def test_an_incomplete_corpus(tmp_path):
    (tmp_path / "test-clean").mkdir()
    soundfile.write(tmp_path / "test-clean" / "a.flac", torch.zeros(400).numpy(), 16_000)
    with pytest.raises(DataError, match=rf"{tmp_path / 'test-clean'}.*\b2620\b.*\b1$"):
        librispeech_lengths(tmp_path)
