"""Resuming: what comes from the checkpoint, what from the command, and which errors there are."""

import functools
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from s3prl_ekd.compat.no_eval import reject_code
from s3prl_ekd.errors import ConfigError, DataError
from s3prl_ekd.files.run_checkpoints import newest_checkpoint, read_checkpoint
from s3prl_ekd.pretrain.config_diff import check_unchanged, source_digests
from s3prl_ekd.pretrain.curves import read_scalars
from s3prl_ekd.pretrain.settings import load_model_config, load_runner_config
from s3prl_ekd.teachers.stored import write_states

from .conftest import edit_yaml, saved_states
from .kill_and_resume import flat_values, unequal


@pytest.fixture
def run(copied_pretraining, pretrain_script):
    """Run in this process in the folder of a finished run; returns (exit code, output)."""
    return functools.partial(pretrain_script, "--device", "cpu")


def test_a_longer_run_has_the_schedule_of_its_length(run):
    more = "config.runner.total_steps=12,,config.optimizer.lr=5.e-3"
    code, output = run("-u", "ekd", "-n", "x", "-a", "-o", more)
    assert code == 0 and saved_states("x")["Step"] == 12
    rates = read_scalars("result/pretrain/x")["ekd/train-lr"]
    # s3prl's schedule by hand: linear from lr at 10 % of the steps to 0 at the end
    for step in (8, 10):
        assert rates[step] == pytest.approx(5e-3 * (1 - step / 12) / 0.9, rel=1e-4)
    # A later resume keeps what -o has set.
    code, output = run("-u", "ekd", "-n", "x", "-a")
    assert code == 0 and re.search(r"\b12 steps\b", output)


@pytest.mark.parametrize("scheduler", [None, {"name": "linear_schedule_with_warmup"}])
def test_a_resumed_run_takes_the_learning_rate_of_the_command(run, tmp_path, scheduler):
    with edit_yaml(tmp_path / "runner.yaml") as config:
        config["optimizer"] = {"name": "FusedAdamW", "lr": 1e-3}
        config["scheduler"] = scheduler and {**scheduler, "num_warmup_steps": 1}
        config["runner"].update(total_steps=4, log_step=1)
    assert run("-u", "ekd", "-n", "y", "-c", "runner.yaml", "-g", "model.yaml")[0] == 0
    more = "config.runner.total_steps=8,,config.optimizer.lr=5.e-3"
    assert run("-u", "ekd", "-n", "y", "-a", "-o", more)[0] == 0
    rates = read_scalars("result/pretrain/y")["ekd/train-lr"]
    # both schedules by hand: linear to 0 at the last step, after a warm-up of about one step
    warmup = 1 if scheduler else 0.07 * 8
    for step in range(5, 8):
        assert rates[step] == pytest.approx(5e-3 * (8 - step) / (8 - warmup), rel=1e-4)


def test_a_new_run_in_the_folder_of_another(run):
    before = {path.name for path in newest_checkpoint("result/pretrain/x").parent.iterdir()}
    code, output = run("-u", "ekd", "-n", "x", "-c", "runner.yaml", "-g", "model.yaml")
    assert code == 2 and re.search(r"(?m)^error: .*result/pretrain/x\b.*\s-a\b", output)
    assert {path.name for path in newest_checkpoint("result/pretrain/x").parent.iterdir()} == before


def test_the_config_of_a_resumed_run_is_checked(run):
    code, output = run("-u", "ekd", "-n", "x", "-a", "-o", "config.runner.save_step=0")
    assert code == 2 and re.search(r"\bsave_step\b.*\b0\b", only_error(output))


@pytest.mark.parametrize("key", ["override", "optimizer", "scheduler"])
def test_text_in_a_checkpoint_is_not_evaluated(run, tmp_path, key):
    """s3prl would evaluate it."""
    code_text = "__import__('os').mkdir('hacked')"
    path = newest_checkpoint("result/pretrain/x")
    states = read_checkpoint(path)
    if key == "override":
        states["Args"].override = f"config.runner.fp16={code_text}"
    else:
        states["Config"][key] = {"name": f"{code_text} or Adam", "lr": 0.1}
    torch.save(states, "new.ckpt")  # not in place, because the tensors are memory-mapped
    os.replace("new.ckpt", path)
    code, output = run("-u", "ekd", "-n", "x", "-a")
    assert not (tmp_path / "hacked").exists()
    assert code == (0 if key == "override" else 2)
    if key != "override":
        assert f"{key}.name" in only_error(output)


@pytest.fixture
def overridden_run(run, tmp_path):
    """``y``, a run whose model config extends another, with ``-o`` and a seed of its own."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "small.yaml").write_text("extends: ../model.yaml\naggregation: average\n")
    change = "config.optimizer.lr=3.e-3,,config.runner.total_steps=4,,config.runner.log_step=1"
    files = ("-c", "runner.yaml", "-g", "sub/small.yaml")
    code, _ = run("-u", "ekd", "-n", "y", *files, "-o", change, "--seed", "7")
    assert code == 0
    return Path("result/pretrain/y")


def test_the_configs_in_the_folder_are_those_of_the_run(overridden_run):
    model = load_model_config(overridden_run / "config_model.yaml")
    assert model == load_model_config("sub/small.yaml") and model.aggregation == "average"
    runner = load_runner_config(overridden_run / "config_runner.yaml")
    assert (runner.optimizer["lr"], runner.runner.total_steps) == (3e-3, 4)
    first = load_runner_config("runner.yaml")
    assert runner.pretrain_expert == first.pretrain_expert


def test_the_configs_in_the_folder_give_an_equal_run(run, overridden_run):
    """As typed in their first lines; weights, optimizer, position and random states are equal."""
    lines = (overridden_run / "config_runner.yaml").read_text().splitlines()
    script, *argv = shlex.split(lines[1].removeprefix("# "))
    assert script == "run_pretrain.py" and argv[-1] == "NAME"
    code, _ = run(*argv[:-1], "z")
    assert code == 0
    outcomes = []
    for name in "yz":
        states = saved_states(name)
        for key in ("Args", "Config"):  # the names of the run and files; its config, compared below
            del states[key]
        scalars = read_scalars(f"result/pretrain/{name}")
        files = [f"result/pretrain/{name}/config_{kind}.yaml" for kind in ("model", "runner")]
        configs = [yaml.safe_load(Path(file).read_text()) for file in files]
        outcomes.append(dict(flat_values([states, scalars, configs])))
    assert not unequal(*outcomes)
    assert sum(isinstance(value, torch.Tensor) for value in outcomes[0].values()) > 100


def test_a_run_is_resumed_with_its_own_configs(run, overridden_run):
    files = [str(overridden_run / f"config_{kind}.yaml") for kind in ("runner", "model")]
    given = ("-u", "ekd", "-n", "y", "-a", "-c", files[0], "-g", files[1])
    code, output = run(*given, "-o", "config.runner.total_steps=6")
    assert code == 0 and saved_states("y")["Step"] == 6
    # they have the changes of the resumed run, too
    assert load_runner_config(files[0]).runner.total_steps == 6
    assert run(*given)[0] == 0


def test_configs_that_lie_in_the_folder_of_the_new_run(run):
    folder = Path("result/pretrain/new")
    folder.mkdir()
    shutil.copy("runner.yaml", folder / "config_runner.yaml")
    shutil.copy("model.yaml", folder / "config_model.yaml")
    files = ("-c", str(folder / "config_runner.yaml"), "-g", str(folder / "config_model.yaml"))
    code, output = run("-u", "ekd", "-n", "new", *files)
    assert code == 0, output
    assert load_runner_config(folder / "config_runner.yaml") == load_runner_config("runner.yaml")


def test_a_missing_device(run):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, output = run("-u", "ekd", "-n", "x", "-a", "--device", "cuda:9")
    assert code == 2 and "--device cuda:9" in only_error(output)


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": {"name": "Adam(print(1))"}},
        {"scheduler": {"name": "x()"}},
        {"downstream_expert": {"modelrc": {"select": "RNNs if 1 else 2"}}},
        {"downstream_expert": {"corpus": {"metric": ["per", "__import__('os')"]}}},
        {"downstream_expert": {"datarc": {"decoder_args": {"unk_weight": "exit()"}}}},
        {"downstream_expert": {"modelrc": {"a": [{"pooling": "a.b"}]}}},
    ],
)
def test_text_that_s3prl_evaluates_must_be_a_name(config):
    with pytest.raises(ConfigError, match="x.yaml"):
        reject_code(config, "x.yaml")


def test_names_and_other_texts_pass():
    from .conftest import REPO

    for path in (REPO / "downstream_recipes").rglob("*.yaml"):
        reject_code(yaml.safe_load(path.read_text()), path.name)
    reject_code({"corpus": {"name": "a b"}, "x": {"unk_weight": "-math.inf"}}, "x.yaml")


def only_error(output):
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "Traceback" not in output
    return line


def test_the_same_command_again(run):
    """With the config files and the -o of the run."""
    same = ("-c", "runner.yaml", "-g", "model.yaml", "-o", "config.runner.log_step=1")
    code, output = run("-u", "ekd", "-n", "x", "-a", *same)
    assert code == 0 and saved_states("x")["Step"] == 6


def test_a_runner_config_that_differs(run, tmp_path):
    with edit_yaml(tmp_path / "runner.yaml") as config:
        config["runner"]["total_steps"] = 12
        config["pretrain_expert"]["datarc"]["train_batch_size"] = 2
    code, output = run("-u", "ekd", "-n", "x", "-a", "-c", "runner.yaml")
    error = only_error(output)
    assert code == 2 and re.search(r"-c runner\.yaml\b.*result/pretrain/x/", error)
    assert "runner.total_steps 6 -> 12" in error and "runner.log_step 1 -> 2" in error
    assert "pretrain_expert.datarc.train_batch_size 3 -> 2" in error
    assert '-o "config.KEY=VALUE"' in error and saved_states("x")["Step"] == 6


def test_a_model_config_that_differs(run, tmp_path):
    with edit_yaml(tmp_path / "model.yaml") as model:
        model["student"]["encoder_layers"] = 1
    code, output = run("-u", "ekd", "-n", "x", "-a", "-g", "model.yaml")
    assert code == 2 and "student.encoder_layers 2 -> 1" in only_error(output)


def test_config_files_that_were_edited_give_a_warning(run, tmp_path, caplog):
    """Those that the run was started with; not the keys that its first ``-o`` has set."""
    first = "config.runner.total_steps=4,,config.optimizer.lr=3.e-3"
    files = ("-c", "runner.yaml", "-g", "model.yaml")
    assert run("-u", "ekd", "-n", "y", *files, "-o", first)[0] == 0
    again = ("-u", "ekd", "-n", "y", "-a", "-o")
    again = (*again, "config.runner.log_step=1,,config.runner.total_steps=6")  # two more steps
    caplog.clear()
    assert run(*again)[0] == 0
    assert "edited" not in caplog.text
    with edit_yaml(tmp_path / "model.yaml") as model:
        model["loss"] = {"cosine_weight": 2.0}
    with edit_yaml(tmp_path / "runner.yaml") as config:
        config["runner"] |= {"max_keep": 9, "total_steps": 8}
    assert run(*again)[0] == 0
    (line,) = [line for line in caplog.messages if "edited" in line]
    for part in ("runner.yaml: runner.max_keep 5 -> 9;", "model.yaml: loss.cosine_weight 1.0 -> 2"):
        assert part in line
    assert "total_steps" not in line and '-o "config.KEY=VALUE"' in line
    caplog.clear()
    (tmp_path / "runner.yaml").write_text("runner: [")
    (tmp_path / "model.yaml").unlink()
    assert run(*again)[0] == 0
    assert "runner.yaml" in caplog.text and "model.yaml" not in caplog.text


def test_another_optimizer(run):
    code, output = run("-u", "ekd", "-n", "x", "-a", "-o", "config.optimizer.name='AdamW'")
    error = only_error(output)
    assert code == 2 and "optimizer.name 'AdamW_with_schedule' -> 'AdamW'" in error


def changed_checkpoint(change):
    """Change the contents of the newest checkpoint."""
    path = newest_checkpoint("result/pretrain/x")
    states = read_checkpoint(path)
    change(states)
    torch.save(states, "new.ckpt")
    for name in (path, path.with_name("last.ckpt")):
        shutil.copy("new.ckpt", name)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (
            lambda states: states["EKD"]["settings"].update(encoder_ffn_embed_dim=32),
            "encoder_ffn_embed_dim 32 -> 64",
        ),
        (lambda states: states["EKD"].pop("heads"), "'heads'"),
        (lambda states: states.pop("Optimizer"), "'Optimizer'"),
        (lambda states: states["EKD_Run"].update(epoch=-3), r"states-6\.ckpt\b.*\bepoch\b"),
        (
            lambda states: states["EKD_Run"]["random"][0].update(torch=torch.zeros(3)),
            r"states-6\.ckpt\b.*\brandom\b",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit(run, change, pattern):
    changed_checkpoint(change)
    code, output = run("-u", "ekd", "-n", "x", "-a", "-o", "config.runner.total_steps=9")
    assert code == 2 and re.search(pattern, only_error(output))


def test_resume_a_checkpoint_of_s3prls_runner(run, caplog):
    changed_checkpoint(lambda states: states.pop("EKD_Run"))
    code, output = run("-u", "ekd", "-n", "x", "-a", "-o", "config.runner.total_steps=9")
    assert code == 0
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any("states-6.ckpt" in warning for warning in warnings)
    # 6 steps of a batch each are 1 epoch of 4 batches, and 2 batches; now there are 9 steps.
    progress = saved_states("x")["EKD_Run"]
    assert (progress["epoch"], progress["batch"], saved_states("x")["Step"]) == (2, 1, 9)


def test_a_corpus_table_that_has_changed(run, tmp_path, corpus, caplog):
    """Its contents count, not its modification time."""
    shutil.copytree(corpus / "tables", "tables")
    longer = (
        f"config.runner.total_steps=9,,config.pretrain_expert.datarc.file_path='{tmp_path}/tables'"
    )
    table = tmp_path / "tables" / "train.csv"
    os.utime(table)
    assert run("-u", "ekd", "-n", "x", "-a", "-o", longer)[0] == 0
    table.write_text(table.read_text().rsplit("\n", 4)[0] + "\n")
    more = longer.replace("=9", "=12")
    code, output = run("-u", "ekd", "-n", "x", "-a", "-o", more)
    error = only_error(output)
    assert code == 2 and str(table) in error
    sets = "config.pretrain_expert.datarc.sets=['train']"
    assert f'-o "{sets}"' in error and saved_states("x")["Step"] == 9
    code, output = run("-u", "ekd", "-n", "x", "-a", "-o", f"{more},,{sets}")
    assert code == 0
    progress = saved_states("x")["EKD_Run"]  # a new epoch, 3, in which 3 steps use 3 batches
    assert (progress["epoch"], progress["batch"], progress["batches"]) == (4, 0, 3)


@pytest.mark.parametrize("file", ["config.json", "model-00002-of-00002.safetensors"])
def test_a_teacher_folder_that_has_changed(tmp_path, file):
    """Of a Hugging Face folder, settings and weights count."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", *shards):
        (folder / name).write_text(name)
    settings = load_model_config({"teachers": {"t": {"model": str(folder)}}})
    saved = source_digests(settings)
    (folder / "README.md").write_text("not read")
    os.utime(folder / file)
    check_unchanged(saved, source_digests(settings))
    check_unchanged({}, source_digests(settings))  # a checkpoint of an earlier version
    (folder / file).write_text("changed")
    with pytest.raises(DataError, match=r"teachers\.t\.model"):
        check_unchanged(saved, source_digests(settings))


def test_stored_states_that_have_changed_give_a_warning(tmp_path, caplog):
    """A run that lacks states of a waveform can be resumed once they are added."""
    wave, states = torch.zeros(1000), torch.zeros(2, 2, 3)
    write_states(tmp_path, wave, states)
    settings = load_model_config({"teachers": {"t": {"model": str(tmp_path)}}})
    saved = source_digests(settings)
    check_unchanged(saved, source_digests(settings))
    assert not caplog.text
    write_states(tmp_path, wave + 1, states)
    check_unchanged(saved, source_digests(settings))
    assert "teachers.t.model" in caplog.text


@pytest.mark.parametrize("how", ["bit", "half", "nothing"])
def test_a_damaged_newest_checkpoint_is_skipped(run, how, caplog, tmp_path):
    caplog.set_level("INFO")
    path = newest_checkpoint("result/pretrain/x")
    assert path.name == "states-6.ckpt"
    data = bytearray(path.read_bytes())
    if how == "bit":
        weights = read_checkpoint(path)["EKD"]["student"]["backbone.encoder.layers.0.fc1.weight"]
        data[data.index(weights.numpy().tobytes()) + 100] ^= 1
    else:
        del data[len(data) // 2 if how == "half" else 0 :]
    for name in ("states-6.ckpt", "last.ckpt"):
        (path.parent / name).write_bytes(bytes(data))
    code, output = run("-u", "ekd", "-n", "x", "-a")
    assert code == 0 and saved_states("x")["Step"] == 6
    assert "result/pretrain/x/states-6.ckpt" in caplog.text
    assert re.search(r"result/pretrain/x/states-3\.ckpt\b.*\b3\b", caplog.text)
    # With -e it is an error.
    (path.parent / "states-6.ckpt").write_bytes(bytes(data))
    code, output = run("-e", str(path))
    assert code == 2 and str(path) in only_error(output)


def test_only_damaged_checkpoints(run):
    for path in newest_checkpoint("result/pretrain/x").parent.glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-1000])
    code, output = run("-u", "ekd", "-n", "x", "-a")
    assert code == 2 and re.search(r"\b3\b.*\bresult/pretrain/x\b", only_error(output))


def test_resuming_an_earlier_step_renames_later_checkpoints(run):
    folder = newest_checkpoint("result/pretrain/x").parent
    (folder / "states-5.ckpt.123.tmp").write_bytes(b"half")  # as a killed run leaves it
    shutil.copy(folder / "states-6.ckpt", folder / "dev-best.ckpt")
    more = "config.runner.total_steps=5,,config.runner.save_step=4"
    code, output = run("-e", str(folder / "states-3.ckpt"), "-o", more)
    assert code == 0 and saved_states("x")["Step"] == 5
    names = {path.name for path in folder.glob("*.ckpt*")}
    assert names == {
        *("states-3.ckpt", "states-4.ckpt", "states-5.ckpt", "last.ckpt"),
        *("states-6.ckpt.old", "last.ckpt.old", "dev-best.ckpt.old"),
    }


def test_resume_a_moved_run(run, tmp_path):
    shutil.move("result/pretrain/x", tmp_path / "moved")
    more = "config.runner.total_steps=8"
    code, output = run("-u", "ekd", "-p", str(tmp_path / "moved"), "-a", "-o", more)
    assert code == 0 and read_checkpoint(newest_checkpoint(tmp_path / "moved"))["Step"] == 8
    assert not os.path.exists("result/pretrain/x")
    code, output = run("-u", "ekd", "-p", "moved", "-a")  # the same folder by a relative path
    assert code == 0
