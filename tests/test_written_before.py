"""What users hold from version 0.1 (``written_by_0_1/``): students, runs, configs, folders."""

import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

import s3prl_ekd
from s3prl_ekd.files.run_checkpoints import newest_checkpoint, read_checkpoint
from s3prl_ekd.hidden_states.fingerprint import upstream_class
from s3prl_ekd.pretrain.sweep import SweepRun
from s3prl_ekd.teachers.distilhubert import DistilHubertUpstream
from s3prl_ekd.teachers.huggingface import HuggingFaceUpstream

from .conftest import REPO, run_python

FILES = REPO / "tests" / "written_by_0_1"
DIGEST = "b91b6379b2814544a7e1607471f0622a374adee1c5ce20c24d2149af43f39ca1"  # of a sweep
NEW = ("-c", "runner.yaml", "--device", "cpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The working folder of the run, with its audio made again."""
    folder = tmp_path_factory.mktemp("written")
    with tarfile.open(FILES / "files.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    for path in FILES.glob("*.yaml"):
        shutil.copy(path, folder)
    (folder / "audio").mkdir()
    for i in range(4):
        generator = random.Random(i)
        wave = [generator.uniform(-0.3, 0.3) for _ in range(6000 + 1600 * i)]
        soundfile.write(folder / f"audio/u{i}.flac", np.array(wave), 16000)
    run = folder / "result/pretrain/old"
    run.mkdir(parents=True)
    shutil.move(folder / "states-3.ckpt", run)
    return folder


@pytest.fixture
def folder(written, tmp_path, monkeypatch):
    """A copy of that folder to work in."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(path):
    """All tensors of a student file or a run's checkpoint, student's and heads'."""
    loaded = s3prl_ekd.load_student(path)
    parts = {"student": loaded.student, "heads": loaded.heads}
    return {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def assert_close(found, expected):
    """The same tensors, as near as different machines compute them."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


# The first four numbers of the last frame of each hidden state, as version 0.1 gave them.
AFTER_3 = [[-0.094795, -0.276222, 0.323288, 0.433763], [-0.945781, -1.373747, 0.288780, 0.298482]]
AFTER_5 = [[-0.101335, -0.274037, 0.313051, 0.435091], [-0.949460, -1.250553, 0.182631, 0.362371]]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("student.pt", AFTER_3),
        ("result/pretrain/old/states-3.ckpt", AFTER_3),
        ("student.safetensors", AFTER_5),
    ],
)
def test_students_give_the_hidden_states_that_they_gave(written, name, expected):
    loaded = s3prl_ekd.load_student(written / name)
    assert set(loaded.targets) == {"average", "hubert", "wavlm", "hubert-wavlm"}
    wave = torch.sin(torch.arange(4000) * 0.05) * torch.linspace(0, 1, 4000)
    with torch.no_grad():
        hidden = loaded.student(wave[None], torch.tensor([4000])).hidden_states
    assert [tuple(states.shape) for states in hidden] == [(1, 12, 8)] * 2
    found = torch.stack([states[0, -1, :4] for states in hidden])
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", [("-n", "old", "-a"), ("-e", "result/pretrain/old/states-3.ckpt")])
def test_a_run_goes_on_where_it_stood(folder, pretrain, how):
    """Statistics, units, optimizer and place in the data are in the checkpoint; no dropout, whose
    random numbers differ between kinds of machines. The steps move weights by 0.01."""
    code, said = pretrain(*how)
    assert code == 0, said
    ended = weights("result/pretrain/old/states-5.ckpt")
    before, expected = weights("student.pt"), load_file("student.safetensors")
    assert max((before[name] - expected[name]).abs().max() for name in expected) > 0.01
    assert_close(ended, expected)


def test_the_command_of_a_run_again(folder, pretrain):
    """Its config has no ``loss.reduce``, whose default was another one."""
    model = ("-g", "model.yaml")
    assert pretrain("-n", "old", "-a", *model, *NEW)[0] == 0
    config = read_checkpoint(newest_checkpoint("result/pretrain/old"))["Upstream_Config"]
    assert config["loss"]["reduce"] == "batches"
    assert_close(weights("result/pretrain/old/states-5.ckpt"), load_file("student.safetensors"))
    assert pretrain("-n", "old", "-a", *model, *NEW)[0] == 0
    text = (folder / "model.yaml").read_text()
    changed = text.replace("\nloss:\n", "\nloss:\n  reduce: frames\n")
    (folder / "model.yaml").write_text(changed)
    code, said = pretrain("-n", "old", "-a", *model, *NEW)
    assert code == 2 and "loss.reduce 'batches' -> 'frames'" in said


@pytest.mark.parametrize(
    "name, heads",
    [
        ("model", {"average", "hubert", "wavlm", "hubert-wavlm"}),
        ("groups", {"average"}),
        ("separate", {"hubert", "wavlm", "hubert-wavlm"}),
    ],
)
def test_configs_with_the_keys_of_that_time(folder, pretrain, name, heads):
    code, said = pretrain("-n", name, "-g", f"{name}.yaml", *NEW)
    assert code == 0, said
    path = f"result/pretrain/{name}/states-5.ckpt"
    assert set(s3prl_ekd.load_student(path).targets) == heads
    if name == "model":  # the keys mean what they meant
        assert_close(weights(path), load_file("student.safetensors"))


def test_checkpoints_of_a_run_have_the_new_keys(folder, pretrain):
    assert pretrain("-n", "new", "-g", "model.yaml", *NEW)[0] == 0
    config = read_checkpoint(newest_checkpoint("result/pretrain/new"))["Config"]["runner"]
    assert config["activation_checkpointing"] is True and config["autosave_minutes"] == 15
    assert not {"recompute", "last_minutes"} & config.keys()


def test_a_cache_of_that_time(folder, pretrain):
    option = "config.pretrain_expert.datarc.target_cache='cache'"
    code, said = pretrain("-n", "cached", "-g", "model.yaml", "-o", option, *NEW)
    assert code == 0, said


def test_the_module_that_init_wrote_finds_the_method(written):
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['UpstreamPretrainExpert'].__mro__)"
    path = written / "pretrain/ekd/pretrain_expert.py"
    assert "from s3prl_ekd.pretrain_expert import UpstreamPretrainExpert" in path.read_text()
    assert "torch.nn.modules.module.Module" in run_python(code, str(path))


def test_a_sweep_of_that_time_is_known_by_its_digest(tmp_path, monkeypatch):
    """``matrix`` keeps a finished run whose digest is that of its settings.

    Its penalty of the conv features was the mean of the batches, which is not the default any more.
    """
    text = (FILES / "model.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    Path("units.safetensors").write_bytes(b"units")  # whose contents were not in the digest
    config = tmp_path / "model.yaml"
    config.write_text(text.replace("\nloss:\n", "\nloss:\n  reduce: batches\n"))
    assert DIGEST not in SweepRun(FILES / "model.yaml", FILES / "runner.yaml", 1, "").digests
    run = SweepRun(config, FILES / "runner.yaml", 1, "")
    first = run.digest
    assert first != DIGEST and DIGEST in run.digests
    Path("units.safetensors").write_bytes(b"others")
    assert first not in run.digests


@pytest.mark.parametrize(
    "kind, name",
    [
        (HuggingFaceUpstream, "s3prl_ekd.teacher_sources.hf_folder.HuggingFaceUpstream"),
        (DistilHubertUpstream, "s3prl_ekd.teacher_sources.distilhubert.DistilHubertUpstream"),
    ],
)
def test_teachers_of_ours_keep_their_names_in_caches(kind, name):
    assert upstream_class(object.__new__(kind)) == name
