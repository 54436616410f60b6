"""`s3prl-ekd recipe`: commands, projection, checks, and a tiny study as a user runs it."""

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s3prl_ekd import cli
from s3prl_ekd.errors import SetupError
from s3prl_ekd.files.run_checkpoints import newest_step
from s3prl_ekd.pretrain.settings import load_model_config, load_runner_config
from s3prl_ekd.recipe import projection
from s3prl_ekd.recipe.plan import ROWS, RecipeOptions, Stage, Training, make_plan
from s3prl_ekd.recipe.run import run
from s3prl_ekd.request import PretrainRequest
from s3prl_ekd.student_file import load_student
from s3prl_ekd.superb.cost import LENGTHS
from s3prl_ekd.workspace import write_workspace

from .conftest import command, error_of
from .corpora import write_iemocap, write_librispeech, write_voxceleb1
from .documented import snippets
from .test_documented_commands import check_options

SPLITS = ("train-clean-100", "train-clean-360", "train-other-500", "dev-clean", "test-clean")
TEXTS = ["A CAT SAT", "THE DOG", "A DOG SAT", "THE CAT SAT"]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """LibriSpeech, VoxCeleb1 and IEMOCAP, each a few utterances of noise."""
    root = tmp_path_factory.mktemp("corpora")
    write_librispeech(root / "LibriSpeech", dict.fromkeys(SPLITS, TEXTS), 0.6)
    split = root / "VoxCeleb1/iden_split.txt"
    write_voxceleb1(split.parent, split, {"id10001": "dev", "id10270": "test"}, 14000)
    write_iemocap(root / "IEMOCAP", ["F_impro01"], ("neu", "hap", "ang", "sad"), 12000)
    return root


def options(corpora, **changes):
    """Options of a plan with all corpora, in the working folder ``w`` that does not exist."""
    values = {"folder": Path("w"), "librispeech": corpora / "LibriSpeech"}
    values |= {"voxceleb1": corpora / "VoxCeleb1", "iemocap": corpora / "IEMOCAP", "g2p": True}
    return RecipeOptions(**{**values, **changes})


def dry_run(capsys, *argv):
    """The commands of a dry run, each as a list of words."""
    capsys.readouterr()
    assert cli.main(["recipe", "ekd960", "--dry-run", *argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [shlex.split(line) for line in lines if line and not line.startswith("#")]


# Commands


def test_a_dry_run_is_a_shell_script_of_accepted_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed = dry_run(capsys, "--rows", *ROWS, "--seeds", "1", "2")
    assert typed[:3] == [["set", "-e"], ["mkdir", "-p", "ekd960"], ["cd", "ekd960"]]
    commands = [words[words[0] == "s3prl-ekd" :] for words in typed[3:]]
    check_options([shlex.join(words) for words in typed[3:]], monkeypatch)
    # two trainings of each pruned student
    assert sum(words[0] == "run_pretrain.py" for words in commands) == 2 * (len(ROWS) + 2)
    assert sum(words[0] == "superb" for words in commands) == 2 * len(ROWS) + 1
    assert [words[0] for words in commands][-1] == "report"
    assert list(tmp_path.iterdir()) == []


def test_what_one_command_writes_the_next_one_reads(corpora):
    for stages in make_plan(options(corpora, rows=list(ROWS))).students.values():
        written = [stage.result for stage in stages]
        assert stages[-2].argv[2] in written  # export reads the last training
        assert stages[-1].argv[1] == stages[-2].result  # superb reads the export
        if len(stages) == 5:
            assert stages[1].argv[1] == stages[0].result
            assert stages[1].result in stages[2].argv


@pytest.mark.parametrize("gpus", [1, 3, 8])
def test_an_update_has_the_same_audio_on_any_number_of_gpus(corpora, tmp_path, gpus):
    """24 utterances, of a pruned student 4 x 160 s, as one GPU and DPHuBERT's four have."""
    write_workspace(tmp_path, [f"experiments/{row}" for row in ROWS])
    plan = make_plan(options(corpora, rows=list(ROWS), gpus=gpus))
    trainings = [stage for stage in plan.stages if isinstance(stage, Training)]
    for stage in trainings:
        argv = list(stage.argv)
        start = argv.index("run_pretrain.py")
        assert gpus == 1 or f"--nproc_per_node={gpus}" in argv[:start]
        request = PretrainRequest.parse(argv[start + 1 :])
        config = load_runner_config(tmp_path / request.config, request.override)
        data, accumulated = config.pretrain_expert.datarc, config.runner.gradient_accumulate_steps
        pruned = stage.name.startswith(("ekd_pruned", "dp_hubert"))
        if pruned:
            audio = gpus * accumulated * data.max_seconds
            assert 640 - 2 * gpus * accumulated < audio <= 640
            assert config.runner.total_steps == (25_000 if "final" in stage.name else 50_000)
            assert config.optimizer["lr"] == (1e-4 if "final" in stage.name else 2e-4)
        else:
            assert gpus * accumulated * data.train_batch_size == 24
            assert config.runner.total_steps == 200_000
        assert config.runner.total_steps == stage.steps
        if "final" not in stage.name:  # prune writes that one
            load_model_config(tmp_path / request.upstream_config)


def test_configs_of_the_working_folder_are_used(corpora, tmp_path):
    write_workspace(tmp_path)
    runner = tmp_path / "pretrain/ekd/config_runner.yaml"
    runner.write_text(runner.read_text().replace("total_steps: 200000", "total_steps: 30000"))
    plan = make_plan(options(corpora, folder=tmp_path, rows=["three_average"]))
    (training,) = [stage for stage in plan.stages if isinstance(stage, Training)]
    assert training.steps == 30_000
    assert not (tmp_path / "pretrain/ekd/experiments").exists()


# Projection


def test_the_projection_is_the_arithmetic_of_its_constants(corpora):
    rows = ["single_hubert", "three_separate", "ekd_pruned_average"]
    costs = projection.project(make_plan(options(corpora, rows=rows)))
    assert sum(map(sum, LENGTHS.values())) / 16_000 == pytest.approx(224.86, abs=0.005)
    rate = 0.15 * 312e12
    audio = 200_000 * 24 * 12.3
    single = 2 * (1669.156e9 + 3 * 825.64e9) / 224.86 * audio / rate / 3600
    three = 2 * (3 * 1669.156e9 + 3 * 825.64e9) / 224.86 * audio / rate / 3600
    pruned = 2 * (3 * 1669.156e9 + 3 * 1669.156e9) / 224.86 * 50_000 * 640 / rate / 3600
    pruned += 2 * (3 * 1669.156e9 + 3 * 654e9) / 224.86 * 25_000 * 640 / rate / 3600
    hours = [cost.distillation for cost in costs.values()]
    assert hours == pytest.approx([single, three, pruned])
    assert single == pytest.approx(12.9, abs=0.05)
    # batches x seconds: PR 100,000 x 2, SID 200,000 x 4, ER 5 folds x 30,000 x 8, ASR 200,000
    tasks = (200_000 * 0.1 + 800_000 * 0.06 + 1_200_000 * 0.06 + 200_000 * 0.65) / 3600
    assert [cost.tasks for cost in costs.values()] == pytest.approx([tasks] * 3)
    assert tasks == pytest.approx(75, abs=0.05)
    # 10 checkpoints, last.ckpt, one that is being written: 12 bytes a parameter; student file
    models = 2 * 12 * (0.3e6 + 0.6e6 + 5 * 0.2e6 + 43e6)
    single = 12 * 12 * 27_034_752 + 4 * 23_491_200 + models
    separate = 12 * 12 * 34_121_856 + 4 * 23_491_200 + models
    sizes = [costs[f"{row}-seed1337"].gigabytes for row in rows[:2]]
    assert sizes == pytest.approx([single / 1e9, separate / 1e9])


def test_a_rate_of_the_user_replaces_the_assumption(corpora):
    """At one update of three_average a second, its 200,000 updates take 200,000 s."""
    plan = make_plan(options(corpora, rows=["three_average", "single_wavlm"]))
    average, single = (cost.distillation for cost in projection.project(plan, 1.0).values())
    assert average == pytest.approx(200_000 / 3600)
    macs = [1669.156 + 3 * 825.64, 3 * 1669.156 + 3 * 825.64]
    assert single / average == pytest.approx(macs[0] / macs[1])


def test_the_page_has_the_output_of_the_dry_run(tmp_path, monkeypatch, capsys):
    """The table and its notes; what is missing depends on the machine."""
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert cli.main(["recipe", "ekd960", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    (page,) = [s.text for s in snippets("docs/replication.md") if s.text.startswith("# student")]
    assert printed.startswith(page)


# Checks before anything runs


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["ekd96"], ["'ekd96'", "ekd960"]),
        (["ekd960", "--rows", "three"], ["--rows", "'three'", "three_average"]),
        (["ekd960", "--seeds", "1", "1"], ["--seeds", "1 1"]),
        (["ekd960", "--gpus", "2", "--jobs", "2"], ["--gpus", "--jobs", "2 and 2"]),
        (["ekd960", "--gpus", "5"], ["--gpus 5", "24", "1, 2, 3, 4, 6, 8, 12, 24"]),
        (["ekd960", "--steps", "1"], ["--steps", "got 1"]),
        (["ekd960", "--updates-per-second", "0"], ["--updates-per-second", "got 0"]),
        (["ekd960", "--tasks", "sid"], ["--tasks sid", "--voxceleb1"]),
        (["ekd960", "--tasks", "all"], ["--tasks sid", "--voxceleb1"]),
        (["ekd960", "--tasks", "asv"], ["'asv'", "pr, sid, er, asr"]),
        (["ekd960", "--jobs", "999"], ["999 GPUs", "--jobs 999", "--tiny"]),
        (["ekd960", "--lexicon", "none.txt"], ["--lexicon", "none.txt"]),
    ],
)
def test_mistakes(corpora, tmp_path, monkeypatch, capsys, argv, parts):
    monkeypatch.chdir(tmp_path)
    error = error_of(capsys, "recipe", *argv, "--librispeech", corpora / "LibriSpeech")
    assert all(part in error for part in parts), error
    assert list(tmp_path.iterdir()) == []


def test_incomplete_corpora(corpora, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "--librispeech DIR" in error_of(capsys, "recipe", "ekd960")
    small = write_librispeech(tmp_path / "a", dict.fromkeys(SPLITS[3:] + SPLITS[:1], TEXTS), 0.3)
    error = error_of(capsys, "recipe", "ekd960", "--librispeech", small)
    assert "train-clean-360.tar.gz" in error
    (tmp_path / "vox").mkdir()
    (tmp_path / "vox/dev").symlink_to(corpora / "VoxCeleb1/dev")
    argv = ("--librispeech", corpora / "LibriSpeech", "--tiny", "--voxceleb1", "vox")
    assert "iden_split.txt" in error_of(capsys, "recipe", "ekd960", *argv)


def test_a_folder_of_another_study_is_refused(corpora, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["recipe", "ekd960", "--librispeech", corpora / "LibriSpeech", "--rows", "dp_hubert"]
    Path("ekd960").mkdir()
    Path("ekd960/recipe.json").write_text('{"format": 1, "options": "--steps 9"}')
    assert "--steps 9" in error_of(capsys, *argv)
    Path("ekd960/recipe.json").unlink()
    write_workspace(Path("ekd960"))
    error = error_of(capsys, *argv, "--tiny")
    assert "config_runner.yaml" in error and str(corpora / "LibriSpeech") in error


def test_a_corpus_can_be_added_later(corpora, tmp_path, monkeypatch, capsys):
    """Configs that were written without VoxCeleb1 read the link of `prepare voxceleb1`."""
    monkeypatch.chdir(tmp_path)
    librispeech = ["--librispeech", str(corpora / "LibriSpeech")]
    assert cli.main(["init", "ekd960", *librispeech]) == 0
    argv = [*librispeech, "--voxceleb1", str(corpora / "VoxCeleb1"), "--tasks", "sid", "asr"]
    capsys.readouterr()
    assert cli.main(["recipe", "ekd960", "--dry-run", "--tiny", *argv]) == 0
    printed = capsys.readouterr().out
    assert "missing" not in printed
    commands = [shlex.split(line)[1:] for line in printed.splitlines() if " voxceleb1 " in line]
    monkeypatch.chdir("ekd960")
    assert [cli.main(argv) for argv in commands] == [0]
    assert cli.main(["superb", "fbank", "--tasks", "sid", "--dry-run"]) == 0


def test_tasks_without_a_corpus_are_left_out(corpora, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    argv = ["recipe", "ekd960", "--librispeech", str(corpora / "LibriSpeech"), "--jobs", "999"]
    error_of(capsys, *argv)
    messages = [record.message for record in caplog.records if "left out" in record.message]
    given = [("SID", "--voxceleb1"), ("ER", "--iemocap"), ("PR", "--lexicon")]
    assert len(messages) == 3
    assert all(task in m and option in m for m, (task, option) in zip(messages, given, strict=True))


# Runs


def test_a_failed_stage_is_named_with_its_log_and_command(corpora, tmp_path):
    plan = make_plan(options(corpora, folder=tmp_path / "w", tiny=True, steps=2))
    bad = Stage("bad", ["export", "student", "none.pt", "-o", "a b.pt"])
    with pytest.raises(SetupError) as caught:
        run(dataclasses.replace(plan, setup=[bad]))
    log = tmp_path / "w/logs/bad.txt"
    assert "stage bad: " in str(caught.value) and str(log) in str(caught.value)
    assert "s3prl-ekd export student none.pt -o 'a b.pt'" in str(caught.value)
    assert "none.pt" in log.read_text()


def test_a_corpus_is_prepared_again_for_other_options(corpora, tmp_path):
    """As with another --lexicon or --voxceleb1; with the same options it is kept."""
    plan = make_plan(options(corpora, folder=tmp_path / "w", tiny=True, steps=2))
    table = tmp_path / "w/t/all.csv"

    def made_of(split):
        argv = ["length-tables", str(corpora / "LibriSpeech" / split), "-o", "t", "--name", "all"]
        stages = [Stage("prepare", argv, "t/all.csv"), Stage("bad", ["export", "none"])]
        with pytest.raises(SetupError, match="stage bad"):
            run(dataclasses.replace(plan, setup=stages))
        return table.stat().st_mtime_ns

    first = made_of("dev-clean")
    assert made_of("dev-clean") == first
    assert made_of("test-clean") > first


def test_a_distillation_runs_and_is_not_repeated(corpora, tmp_path):
    """Setup and the first stages of a tiny student; its checkpoint has the projected size."""
    folder = tmp_path / "w"
    rows = ["single_hubert"]
    plan = make_plan(options(corpora, folder=folder, rows=rows, tasks=["asr"], tiny=True, steps=2))
    ((name, stages),) = plan.students.items()
    plan = dataclasses.replace(
        plan, setup=plan.setup[:2], students={name: stages[:2]}, report=Stage("end", ["init", "."])
    )
    run(plan)
    checkpoint = folder / f"result/pretrain/{name}/states-2.ckpt"
    student = folder / f"{name}.safetensors"
    assert newest_step(checkpoint.parent) == 2 and load_student(student).about["step"] == 2
    (folder / "logs" / f"{name}-distil.txt").unlink()
    (folder / "logs" / "prepare-librispeech.txt").unlink()
    # the student is enough: the checkpoints may be removed
    size = checkpoint.stat().st_size
    for path in checkpoint.parent.glob("*.ckpt"):
        path.unlink()
    run(plan)
    assert not (folder / "logs" / f"{name}-distil.txt").exists()
    assert not (folder / "logs" / "prepare-librispeech.txt").exists()
    loaded = load_student(student)
    frozen = sum(p.numel() for p in loaded.student.backbone.feature_extractor.parameters())
    parameters = sum(p.numel() for p in loaded.student.parameters()) + 3 * 192 * 192 * 2
    expected = 4 * (projection.STATES * parameters - (projection.STATES - 1) * frozen)
    assert size == pytest.approx(expected, rel=0.05)


STUDY = ("--rows", "ekd_pruned_average", "--tasks", "sid", "--tiny", "--steps", "6")


@pytest.mark.slow
def test_a_killed_study_ends_as_one_that_was_not(corpora, tmp_path):
    """SIGKILL during a distillation of the pruned student, then the same command again."""
    argv = ["recipe", "ekd960", "--librispeech", str(corpora / "LibriSpeech"), *STUDY]
    argv += ["--voxceleb1", str(corpora / "VoxCeleb1")]
    command(*argv, "-o", "whole", cwd=tmp_path, timeout=900)
    killed = subprocess.Popen(
        [sys.executable, "-m", "s3prl_ekd", *argv, "-o", "killed"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run_folder = tmp_path / "killed/result/pretrain/ekd_pruned_average-seed1337"
    while not (run_folder / "states-3.ckpt").is_file():
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed/ekd_pruned_average-seed1337.safetensors").exists()
    again = command(*argv, "-o", "killed", cwd=tmp_path, timeout=900)
    assert "prepare-librispeech" not in again.stdout
    files = [tmp_path / f / "ekd_pruned_average-seed1337.safetensors" for f in ("whole", "killed")]
    states = [load_student(path).student.state_dict() for path in files]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    reports = [(tmp_path / f / "report/report.csv").read_text() for f in ("whole", "killed")]
    assert reports[0] == reports[1] and "ekd_pruned_average-seed1337" in reports[0]
    error = command(*argv, "-o", "whole", "--steps", "7", cwd=tmp_path, check=False)
    assert error.returncode == 2 and "--tiny --steps 6" in error.stderr
