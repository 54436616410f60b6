"""tools/bench: timer, FLOP counts and figures against worked-out values; variants; a small run."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from s3prl_ekd.errors import DataError
from tools.bench.__main__ import main
from tools.bench.inputs import SIZES, write_corpus, write_teachers
from tools.bench.measure import STAGES, StageTimer, clock, flop_counter, matmul_rate, peak_memory
from tools.bench.report import STEP, audio_rate, plot, projection, quartiles, summary, table
from tools.bench.variants import BenchPlan, EkdVariant, S3prlVariant, copy_weights

from .conftest import REPO, command

pytestmark = pytest.mark.slow  # of the developers' tools


def test_a_stage_is_timed_without_nested_stages():
    times = iter([0, 3, 7, 12, 20, 21, 30, 32, 40, 41])
    timer = StageTimer(lambda: next(times))

    class Model:
        def forward(self, x, y):
            return x + y

    model = Model()
    with timer.method(model, "forward", "student forward"):
        with timer("loss"):  # from 0 to 21
            with timer("teacher forward"):  # 3 to 7
                pass
            assert model.forward(1, y=2) == 3  # 12 to 20
    assert vars(model) == {}
    with pytest.raises(KeyError), timer("backward"):  # 30 to 32
        raise KeyError
    with timer("optimizer"):  # 40 to 41
        pass
    assert timer.totals == {
        "data": 0, "teacher forward": 4, "student forward": 8, "loss": 9, "backward": 2,
        "optimizer": 1,
    }  # fmt: skip


def test_flops_of_matmul_convolution_and_attention():
    """Worked out with two operations for a multiply-add."""
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    q = torch.randn(1, 2, 6, 8)
    with torch.inference_mode(), flop_counter() as counter:
        torch.bmm(a, b).baddbmm_(a, b)
    assert counter.get_total_flops() == 2 * (2 * 2 * 3 * 4 * 5)
    with torch.no_grad(), flop_counter() as counter:
        torch.nn.functional.conv1d(torch.randn(1, 3, 12), torch.randn(5, 3, 4), stride=2)
    assert counter.get_total_flops() == 2 * 5 * (3 * 4 * 5)  # 5 frames
    with torch.no_grad(), flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * 2 * (2 * 6 * 6 * 8)
    assert 1e8 < matmul_rate("cpu", repeats=1) < 1e14


def result():
    """A made-up result of three turns: teachers take half as long in variant ekd."""

    def variant(teacher, flops):
        zero = dict.fromkeys(STAGES, 0.0)
        return {
            "seconds": [
                {**zero, "teacher forward": teacher * turn, "optimizer": 0.1} for turn in (1, 2, 3)
            ],
            "audio": [4.0, 2.0, 3.0],
            "flops": {**zero, "teacher forward": flops},
            "flops_audio": 4.0,
            "memory": {"peak": 3 * 2**20, "kind": "RSS"},
        }

    about = {
        "size": "tiny", "batch": 2, "longest_seconds": 4.0, "turns": 3, "device": "cpu",
        "threads": 1, "torch": "2", "matmul_rate": 1e9, "time": "wall",
    }  # fmt: skip
    return {"about": about, "variants": {"s3prl": variant(0.2, 8e7), "ekd": variant(0.1, 4e7)}}


def test_figures_against_worked_out_values():
    assert quartiles([4, 1, 3, 2, 5]) == (2, 3, 4)
    figures = summary(result())["ekd"]
    teacher, step = figures["teacher forward"], figures[STEP]
    assert teacher["seconds"] == pytest.approx((0.15, 0.2, 0.25))
    assert teacher["ratio"] == pytest.approx((0.5, 0.5, 0.5)) and figures["data"]["ratio"] is None
    # 4e7 operations over 4 s of audio; the median batch has 3 s: 3e7 at 1e9 a second.
    assert teacher["roofline"] == step["roofline"] == pytest.approx(0.03)
    # 0.2 / 0.3, 0.3 / 0.5 and 0.4 / 0.7 of the turns of s3prl
    assert step["ratio"].median == pytest.approx(0.6)
    # 4 s in 0.2 s, 2 s in 0.3 s, 3 s in 0.4 s
    assert audio_rate(result()["variants"]["ekd"]) == pytest.approx(7.5)


def cells(text):
    lines = [[c.strip() for c in x.strip("|").split("|")] for x in text.splitlines() if "|" in x]
    assert len({len(line) for line in lines}) == 1
    return {line[0]: line[1:] for line in lines}


def test_the_table_has_a_line_for_each_stage():
    lines = cells(table(result()))
    assert list(lines)[2:] == [
        *STAGES, f"**{STEP}**", "seconds of audio per second", "peak memory (RSS)",
    ]  # fmt: skip
    assert lines["teacher forward"] == ["400.0", "200.0", "0.50 (0.50 to 0.50)", "60.0", "30.0"]
    assert lines["peak memory (RSS)"][:2] == ["3 MiB", "3 MiB"]


def test_projected_hours_at_7_5_seconds_of_audio_per_second():
    lines = cells(projection(result(), "ekd"))
    # 960 h / 7.5, and 200,000 x 24 x 12.3 s = 16,400 h / 7.5
    assert lines["one pass over LibriSpeech 960 h"] == ["128.0", "16.0", "4.0"]
    assert lines["200,000 steps of 24 utterances"][0] == "2,186.7"


def test_the_plot_is_a_png(tmp_path):
    plot(result(), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write_corpus(folder, 4, 1.0)
    return BenchPlan(folder, write_teachers(folder, SIZES["tiny"]), "tiny", "cpu", 2)


@pytest.fixture(scope="module")
def variants(plan):
    ekd, s3prl = EkdVariant(plan), S3prlVariant(plan)
    copy_weights(ekd, s3prl)
    return ekd, s3prl


def test_both_variants_get_the_same_batches_and_the_same_loss(variants, monkeypatch):
    """The losses are equal in eval mode and without padding."""
    ekd, s3prl = variants
    monkeypatch.setattr("tools.bench.variants._update", lambda *args: None)
    for module in (ekd.expert, s3prl.model):
        module.eval()
    read, dataset, timer = s3prl.read, ekd.dataset, StageTimer(lambda: 0.0)
    for index in range(2):
        waves, padded, mask = read(s3prl.buckets.X[index])
        batch = dataset[index]
        torch.testing.assert_close(batch.waves, padded)
        assert batch.lengths.tolist() == [len(wave) for wave in waves] == mask.sum(1).tolist()
        short = min(map(len, waves))
        lengths = torch.full_like(batch.lengths, short)
        cut = batch._replace(waves=batch.waves[:, :short], lengths=lengths)
        monkeypatch.setattr(ekd, "dataset", [cut])
        arguments = (list(cut.waves), cut.waves, torch.ones_like(cut.waves))
        monkeypatch.setattr(s3prl, "read", lambda files, arguments=arguments: arguments)
        result, expected = ekd.step(0, timer), s3prl.step(index, timer)
        assert result == pytest.approx(expected, rel=1e-5)
        assert result[1] == 2 * short / 16000  # seconds of audio
    for module in (ekd.expert, s3prl.model):
        module.train()


def test_a_step_has_all_stages_and_changes_only_the_student(variants):
    ekd, s3prl = variants
    for variant, student, teachers in (
        (ekd, ekd.expert.distiller.student, ekd.expert.distiller.teachers),
        (s3prl, s3prl.distiller, s3prl.teachers),
    ):
        before = {name: weight.clone() for name, weight in student.state_dict().items()}
        frozen = {name: weight.clone() for name, weight in teachers.state_dict().items()}
        timer = StageTimer(clock("cpu"))
        loss, _ = variant.step(0, timer)
        assert np.isfinite(loss) and all(timer.totals.values())
        assert any(not torch.equal(w, before[name]) for name, w in student.state_dict().items())
        assert all(torch.equal(w, frozen[name]) for name, w in teachers.state_dict().items())


def test_both_variants_have_the_same_flops(variants):
    """Up to 2 %: s3prl pads to an even number of frames, and has one head where ekd has three."""
    counts = []
    for variant in variants:
        with flop_counter() as counter:
            timer = StageTimer(counter.get_total_flops)
            variant.step(0, timer)
        counts.append(timer.totals)
    for stage in ("teacher forward", "student forward", "backward"):
        assert counts[0][stage] == pytest.approx(counts[1][stage], rel=0.02)
    assert counts[0]["optimizer"] == counts[0]["data"] == 0


def test_s3prl_trains_and_optimises_the_teachers_modules(variants):
    s3prl = variants[1]
    assert all(module.training for module in s3prl.model.modules())
    count = sum(len(group["params"]) for group in s3prl.optimizer.param_groups)
    assert count == len(list(s3prl.model.parameters()))  # the frozen teachers' too


def test_cached_targets_run_no_teacher(plan):
    """The loss is the same up to float16 and padding of the cached targets."""
    ekd, cached = EkdVariant(plan), EkdVariant(plan, cached=True)
    timer, losses = StageTimer(clock("cpu")), []
    for variant in (ekd, cached):
        torch.manual_seed(3)
        losses.append(variant.step(0, timer)[0])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert not list(cached.expert.distiller.teachers.parameters())
    index = (plan.folder / "targets_float16" / "index.json").stat()
    EkdVariant(plan, cached=True)  # as in the process that measures memory
    assert (plan.folder / "targets_float16" / "index.json").stat() == index


def test_real_audio_is_cropped_and_counted(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number, length in enumerate((24000, 9000, 16000)):
        wave = 0.1 * np.sin(np.arange(length))
        soundfile.write(source / f"{number}.wav", wave, 16000, subtype="PCM_16")
    for name in ("folder", "more"):
        (tmp_path / name).mkdir()
    write_corpus(tmp_path / "folder", 3, 1.0, source)
    files = sorted((tmp_path / "folder/audio").iterdir())
    assert [soundfile.info(file).frames for file in files] == [16000, 9000, 16000]
    with pytest.raises(DataError, match=r"\b3\b.*\b4\b"):
        write_corpus(tmp_path / "more", 4, 1.0, source)


def test_peak_memory_is_measured(plan):
    memory = peak_memory(plan, "ekd")
    assert memory["kind"] == "RSS" and 50e6 < memory["peak"] < 4e9


def bench(*argv):
    return subprocess.run(
        [sys.executable, "-m", "tools.bench", *map(str, argv)],
        cwd=REPO,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    out = tmp_path / "bench.json"
    argv = ("--seconds", 0.5, "--batch", 2, "--turns", 2, "--no-memory", "-o", out)
    result = bench(*argv)
    assert result.returncode == 0, result.stderr
    assert "| teacher forward |" in result.stdout
    written = json.loads(out.read_text())
    assert list(written["variants"]) == ["s3prl", "ekd"] and written["about"]["turns"] == 2
    ekd = written["variants"]["ekd"]
    assert [len(ekd[key]) for key in ("seconds", "audio", "losses")] == [2] * 3
    totals = [sum(turn.values()) for turn in ekd["seconds"]]
    assert written["summary"]["ekd"][STEP]["seconds"][1] == pytest.approx(np.median(totals))
    result = bench(*argv)
    assert result.returncode == 2 and str(out) in result.stderr


@pytest.mark.parametrize(
    "argv",
    ["--batch 1", "--turns 0", "--seconds 0", "--device tpu", "--data nowhere", "-o no/where.json"],
)
def test_an_invalid_option_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv.split())
    assert exit_info.value.code == 2
    assert argv.removeprefix("-o ") in capsys.readouterr().err


def test_the_old_command_names_the_new_one(tmp_path):
    result = command("bench", "--size", "base", cwd=tmp_path, check=False)
    assert result.returncode == 2 and "python -m tools.bench" in result.stderr


@pytest.mark.parametrize(("size", "millions"), [("base", 94), ("large", 316)])
def test_sizes_are_those_of_the_published_models(size, millions):
    """HuBERT Base and Large have 94.7 and 316.6 million parameters (SUPERB's table)."""
    from s3prl_ekd.teachers.random_weights import hubert_checkpoint

    with torch.device("meta"):
        weights = hubert_checkpoint(**SIZES[size].teacher)["model_weight"]
    assert sum(w.numel() for w in weights.values()) / 1e6 == pytest.approx(millions, abs=1)
