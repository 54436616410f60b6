"""`s3prl-ekd bench`: its clock, counts and figures by hand, and one small run of it all."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from s3prl_ekd.errors import DataError, SetupError
from s3prl_ekd.evaluate import bench_memory
from s3prl_ekd.evaluate.bench import _operations
from s3prl_ekd.evaluate.bench_clock import STAGES, Clock, seconds
from s3prl_ekd.evaluate.bench_corpus import write_corpus
from s3prl_ekd.evaluate.bench_floor import flop_counter, matrix_rate
from s3prl_ekd.evaluate.bench_plot import plot_bench
from s3prl_ekd.evaluate.bench_report import STEP, audio_rate, ratios, rows, spread, summary, table
from s3prl_ekd.evaluate.bench_sides import (
    SIDES,
    Baseline,
    Ours,
    Plan,
    audio_seconds,
    copy_weights,
    padding_share,
)
from s3prl_ekd.teachers.random_weights import SIZES, TEACHERS, write_teachers

from .conftest import command


def test_the_clock_charges_a_stage_without_those_inside_it():
    time = iter([(0, 0), (3, 1), (7, 2), (12, 4), (20, 5), (21, 6)])
    clock = Clock(lambda: next(time, (21, 6)))
    clock.spent.update({"outer": [0.0, 0.0], "inner": [0.0, 0.0]})
    with clock("outer"):  # from 0
        with clock("inner"):  # 3 to 7
            pass
        assert clock.wrap("inner", lambda x, y: x + y)(1, y=2) == 3  # 12 to 20
    assert clock.spent == {"outer": [3 + 5 + 1, 1 + 2 + 1], "inner": [4 + 8, 1 + 1]}


def test_the_clock_goes_on_after_an_error():
    time = iter([(0,), (2,), (5,), (9,)])
    clock = Clock(lambda: next(time))
    clock.spent.update({"a": [0.0], "b": [0.0]})
    with pytest.raises(KeyError), clock("a"):
        raise KeyError
    with clock("b"):
        pass
    assert clock.spent == {"a": [2], "b": [4]}


def test_wall_and_cpu_time_are_in_seconds():
    clock = Clock(seconds("cpu"))
    with clock("busy"):
        begin = seconds("cpu")()[1]
        while seconds("cpu")()[1] < begin + 0.05:
            pass
    wall, cpu = clock.spent["busy"]
    assert 0.05 <= cpu < 1 and wall >= 0.9 * cpu


def test_operations_of_a_product_a_convolution_and_attention():
    """By hand: two for each multiplication and addition."""
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
    assert 1e8 < matrix_rate("cpu", tries=1) < 1e14


def test_spread_and_ratios_by_hand():
    assert spread([4, 1, 3, 2, 5]) == SimpleSpread(3, 2, 4)
    assert ratios([1, 4, 9], [2, 2, 3]) == SimpleSpread(2, 1.25, 2.5)  # 0.5, 2, 3
    assert ratios([1, 1], [0, 0]) is None


class SimpleSpread:
    def __init__(self, median, low, high):
        self.values = median, low, high

    def __eq__(self, other):
        return self.values == (other.median, other.low, other.high)


def result():
    """A made-up measurement of three turns: ours has half the teacher's time."""

    def side(teacher, optimizer, flops):
        wall = [dict.fromkeys(STAGES, 0.0) for _ in range(3)]
        for turn, times in enumerate(wall):
            times |= {"teacher forward": teacher * (turn + 1), "optimizer": optimizer}
        return {
            "wall": wall,
            "cpu": [{stage: 2 * time for stage, time in times.items()} for times in wall],
            "audio": [4.0, 2.0, 3.0],
            "flops": {**dict.fromkeys(STAGES, 0.0), "teacher forward": flops},
            "flops_audio": 4.0,
            "losses": [1.0, 1.0, 1.0],
            "padding": 0.125,
            **({"difference": {"largest": 4e-6, "share": 2e-7}} if teacher == 0.1 else {}),
            "memory": {"peak": 3 * 2**20, "before": 2**20, "kind": "RSS"},
        }

    about = {
        "size": "tiny", "batch": 2, "longest_seconds": 4.0, "turns": 3, "device": "cpu",
        "threads": 1, "torch": "2", "matrix_rate": 1e9, "distort": False,
    }  # fmt: skip
    return {
        "about": about,
        "sides": {"baseline": side(0.2, 0.1, 8e7), "ours": side(0.1, 0.1, 4e7)},
    }


def test_rows_by_hand():
    made = rows(result())
    teacher = made["ours"]["teacher forward"]
    assert teacher.wall == SimpleSpread(0.2, 0.15000000000000002, 0.25)
    assert teacher.cpu.median == pytest.approx(0.4)
    assert teacher.ratio.median == teacher.ratio.high == pytest.approx(0.5)
    assert teacher.cpu_ratio.median == pytest.approx(0.5)
    # 4e7 operations over 4 s of sound; the median batch has 3 s: 3e7 at 1e9 a second.
    assert teacher.floor == pytest.approx(0.03)
    # 0.2 / 0.3, 0.3 / 0.5 and 0.4 / 0.7 of the baseline's turns
    step = made["ours"][STEP]
    assert step.ratio.median == pytest.approx(0.6) and step.floor == pytest.approx(0.03)
    assert made["ours"]["distort"].ratio is None
    # 4 s in 0.2 s, 2 s in 0.3 s, 3 s in 0.4 s
    assert audio_rate(result()["sides"]["ours"]).median == pytest.approx(7.5)
    assert summary(result())["ours"]["stages"][STEP]["wall"]["median"] == pytest.approx(0.3)


def test_the_table_has_a_column_a_side_and_a_line_a_stage():
    lines = table(result()).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    assert len({len(line) for line in cells}) == 1
    by_name = {line[0]: line[1:] for line in cells}
    assert "distort" not in by_name and "loss" in by_name
    assert by_name["teacher forward"][:3] == [
        "400.0 (800.0)", "200.0 (400.0)", "0.50 (0.50 to 0.50)",
    ]  # fmt: skip
    assert by_name["teacher forward"][-2:] == ["60.0", "30.0"]
    assert by_name["padding"][:2] == ["12.5%", "12.5%"]
    apart = by_name["targets apart from eval mode's: largest (mean share)"]
    assert apart[:3] == ["", "4.0e-06 (2.0e-07)", ""]
    assert by_name["peak memory (RSS)"][:2] == ["3 MiB", "3 MiB"]
    assert "1 GFLOP/s" in lines[-1]


def test_the_plot_is_a_png():
    assert plot_bench(result())[:8] == b"\x89PNG\r\n\x1a\n"


def test_padding_and_audio_by_hand():
    lengths = [torch.tensor([16000, 8000]), torch.tensor([4000, 4000])]
    assert padding_share(lengths) == pytest.approx(8000 / 40000)
    assert audio_seconds(lengths[0]) == 1.5


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write_corpus(folder, 4, 1.0, None)
    return Plan(folder, write_teachers(folder, SIZES["tiny"]), "tiny", "cpu", 2)


@pytest.fixture(scope="module")
def sides(plan):
    made = Ours(plan), Baseline(plan)
    copy_weights(*made)
    return made


def test_both_sides_hear_the_same_batches_and_compute_the_same_loss(sides, monkeypatch):
    """In eval mode, over a batch without padding: where s3prl's loss and ours mean the same."""
    ours, baseline = sides
    monkeypatch.setattr("s3prl_ekd.evaluate.bench_sides._update", lambda *args: None)
    ours.distiller.eval()
    baseline.model.eval()
    read = baseline._batch
    try:
        for index in range(2):
            waves, each, lengths, mask = read(baseline.buckets.X[index])
            batch = ours.dataset[index]
            torch.testing.assert_close(batch.waves, waves)
            assert batch.lengths.tolist() == lengths.tolist()
            short = int(lengths.min())
            cut = batch._replace(waves=waves[:, :short], lengths=torch.full_like(lengths, short))
            monkeypatch.setattr(
                baseline,
                "_batch",
                lambda files, cut=cut, short=short: (
                    cut.waves,
                    [wave[:short] for wave in cut.waves],
                    cut.lengths,
                    torch.ones_like(cut.waves),
                ),
            )
            monkeypatch.setattr(ours, "dataset", Items(cut))
            clock = Clock(lambda: (0.0,))
            assert ours.step(0, clock)[0] == pytest.approx(baseline.step(index, clock)[0], rel=1e-5)
            monkeypatch.undo()
            monkeypatch.setattr("s3prl_ekd.evaluate.bench_sides._update", lambda *args: None)
    finally:
        ours.distiller.train()
        baseline.model.train()


class Items:
    """A dataset of one batch."""

    def __init__(self, batch):
        self.batch = batch

    def _distort(self, *args):
        raise AssertionError("never called")

    def __getitem__(self, index):
        return self.batch


def test_a_step_is_charged_to_its_stages_and_changes_the_student_alone(sides):
    for side, model, frozen in (
        (sides[0], sides[0].distiller.student, sides[0].distiller.teachers),
        (sides[1], sides[1].model.distiller, sides[1].model.teachers),
    ):
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        teachers = {name: weight.clone() for name, weight in frozen.state_dict().items()}
        clock = Clock(seconds("cpu"))
        loss, lengths = side.step(0, clock)
        assert np.isfinite(loss) and len(lengths) == 2
        used = {stage for stage, spent in clock.spent.items() if spent[0] > 0}
        assert used - {"distort"} == set(STAGES) - {"distort"}
        assert any(not torch.equal(w, before[name]) for name, w in model.state_dict().items())
        assert all(torch.equal(w, teachers[name]) for name, w in frozen.state_dict().items())
        # The methods that were charged are the class's own again.
        assert "forward" not in vars(model) and "states" not in vars(frozen)


def test_both_sides_have_the_same_operations(sides):
    """The highest layer is a target, so both run all layers; ours pads no frames to an even count,
    and its heads are three where the baseline has one."""
    ours, theirs = (_operations(side) for side in sides)
    for stage in ("teacher forward", "student forward", "backward"):
        assert ours["flops"][stage] == pytest.approx(theirs["flops"][stage], rel=0.02)
    assert ours["flops"]["optimizer"] == ours["flops"]["read and decode"] == 0
    assert ours["flops_audio"] == theirs["flops_audio"]


def test_the_targets_difference_is_to_the_experts_in_eval_mode(sides):
    """Rounding apart there is none; a broken encoder is seen, and put back."""
    ensemble = sides[0].distiller.teachers
    found = sides[0].difference()
    assert 0 < found["share"] < 1e-5 and 0 < found["largest"] < 1e-4
    encoder = ensemble["wavlm"].encoder

    class Doubled:
        def hidden_states(self, *args):
            return {n: 2 * state for n, state in encoder.hidden_states(*args).items()}

    ensemble["wavlm"].encoder = Doubled()
    assert sides[0].difference()["share"] == pytest.approx(1 / 3, abs=1e-4)  # of three teachers
    assert isinstance(ensemble["wavlm"].encoder, Doubled)
    ensemble["wavlm"].encoder = encoder


def test_the_baseline_is_as_s3prl_has_it(sides):
    baseline = sides[1]
    assert all(module.training for module in baseline.model.modules())
    held = sum(len(group["params"]) for group in baseline.optimizer.param_groups)
    assert held == len(list(baseline.model.parameters()))  # the frozen teachers' too
    assert list(baseline.model.teachers) == list(TEACHERS)


def test_distortion_is_a_stage_of_its_own(plan):
    side = Ours(Plan(plan.folder, plan.teachers, "tiny", "cpu", 2, distort=True))
    clock = Clock(seconds("cpu"))
    side.step(1, clock)
    assert clock.spent["distort"][0] > 1e-4


def test_real_audio_is_cut_and_counted(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number, length in enumerate((24000, 9000, 16000)):
        wave = 0.1 * np.sin(np.arange(length))
        soundfile.write(source / f"{number}.wav", wave, 16000, subtype="PCM_16")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_corpus(folder, 3, 1.0, source)
    assert [soundfile.info(f).frames for f in sorted((folder / "audio").iterdir())] == [
        16000, 9000, 16000,
    ]  # fmt: skip
    (tmp_path / "more").mkdir()
    with pytest.raises(DataError, match="has 3 audio files and the benchmark wants 4"):
        write_corpus(tmp_path / "more", 4, 1.0, source)


def test_peak_memory_is_of_a_process_of_its_own(plan, monkeypatch):
    assert bench_memory.peak_resident() >= bench_memory.resident() * 0.9 > 10e6
    found = bench_memory.peak_memory(plan, "ours")
    assert found["kind"] == "RSS" and found["peak"] > found["before"] > 10e6
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nMemoryError: no room", stdout="")
    monkeypatch.setattr(bench_memory.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(SetupError, match="peak memory of ours .*MemoryError: no room"):
        bench_memory.peak_memory(plan, "ours")


def test_the_command_measures_prints_and_writes(tmp_path):
    done = command("bench", "--seconds", 0.5, "--batch", 2, "--turns", 2, "-o", "out", cwd=tmp_path)
    assert "| teacher forward |" in done.stdout and "| peak memory (RSS) |" in done.stdout
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert list(written["sides"]) == ["baseline", "ours"] and written["about"]["turns"] == 2
    ours = written["sides"]["ours"]
    assert [len(ours[key]) for key in ("wall", "cpu", "audio", "losses")] == [2] * 4
    assert set(ours["wall"][0]) == set(STAGES)
    step = written["summary"]["ours"]["stages"][STEP]
    walls = [sum(turn.values()) for turn in ours["wall"]]
    assert step["wall"]["median"] == pytest.approx(np.median(walls))
    assert (tmp_path / "out" / "bench.png").read_bytes()[:4] == b"\x89PNG"
    again = command("bench", "-o", "out", cwd=tmp_path, check=False)
    assert again.returncode == 2 and "bench.json exists" in again.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch", "1"), "--batch 1: s3prl's buckets drop single utterances"),
        (("--turns", "0"), "--turns 0: at least 1"),
        (("--seconds", "0"), "--seconds 0: 0.1 to 60"),
        (("--device", "tpu"), "--device tpu: cpu, cuda or cuda:N"),
        (("--data", "nowhere"), "--data: there is no folder nowhere"),
    ],
)
def test_mistakes_are_a_sentence(tmp_path, monkeypatch, words, said):
    import argparse

    from s3prl_ekd.commands import bench

    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    bench.configure(parser)
    with pytest.raises(SetupError, match="^" + said):
        bench.main(parser.parse_args(words))


def test_sizes_and_sides_are_those_of_the_command():
    from s3prl_ekd.commands import bench

    assert tuple(SIZES) == bench.SIZES
    assert tuple(SIDES) == ("baseline", *bench._SIDES)


@pytest.mark.parametrize(("size", "millions"), [("base", 94), ("large", 316)])
def test_sizes_are_those_of_the_published_models(size, millions):
    """HuBERT Base and Large have 94.7 and 316.6 million parameters (SUPERB's table)."""
    from s3prl.upstream.hubert.hubert_model import (
        HubertConfig,
        HubertModel,
        HubertPretrainingConfig,
    )

    config = SIZES[size].config()
    task = HubertPretrainingConfig(normalize=config.pop("normalize", False))
    with torch.device("meta"):
        model = HubertModel(HubertConfig(label_rate=50.0, **config), task, [["0"]])
    count = sum(weight.numel() for weight in model.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=1)
