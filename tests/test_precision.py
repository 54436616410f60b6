"""Precision of training: what ``auto`` means, what a run records, and what a resumed run keeps."""

import re
import shutil

import pytest
import torch

from s3prl_ekd.system import precision
from s3prl_ekd.system.precision import choose_precision

from .cache_cases import adapter, cache, configs
from .conftest import edit_yaml, saved_states


@pytest.fixture
def amx(monkeypatch):
    """Set whether the CPU seems to have AMX; it lacks it first."""

    def set_amx(value):
        monkeypatch.setattr(precision, "has_amx", lambda: value)

    set_amx(False)
    return set_amx


def change_model(**changes):
    with edit_yaml("model.yaml") as config:
        config.update(changes)


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16"), ((12, 0), "bfloat16")],
)
def test_auto_on_a_gpu(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found, reason = choose_precision("auto", "cuda:1", "x")
    assert found == chosen and "{}.{}".format(*capability) in reason


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        ("fpu avx512f avx512_bf16", "float32"),  # bfloat16 products without tiles are no faster
        ("fpu avx512f amx_tile amx_int8", "float32"),
        ("fpu amx_bf16 avx512_bf16 amx_tile amx_int8", "bfloat16"),
        (None, "float32"),
    ],
)
def test_auto_on_a_cpu(monkeypatch, tmp_path, flags, chosen):
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"processor\t: 0\nmodel name\t: X\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    monkeypatch.setattr(precision, "Path", lambda name: file)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    found, reason = choose_precision("auto", "cpu", "x")
    assert found == chosen and "AMX" in reason


@pytest.mark.parametrize("setting", ["bfloat16", "float16"])
def test_a_slower_precision_is_used_with_a_warning(amx, caplog, setting):
    assert choose_precision(setting, "cpu", "teacher_precision")[0] == setting
    (record,) = caplog.records
    assert re.search(rf"teacher_precision\b.*\b{setting}\b.*slower", record.getMessage())
    caplog.clear()
    amx(True)
    assert choose_precision("bfloat16", "cpu", "x")[0] == "bfloat16" and not caplog.records
    assert choose_precision("float32", "cpu", "x")[0] == "float32" and not caplog.records


SHORT = {"total_steps": 3, "save_step": 2, "log_step": 1}


def test_a_run_keeps_the_precision_it_began_with(pretrain_with, pretrain_folder, amx, caplog):
    """Also with -a and the same files, on a machine where ``auto`` means another one."""
    caplog.set_level("INFO")
    change_model(teacher_precision="auto")
    assert pretrain_with("x", precision="auto", **SHORT)[0] == 0
    assert "precision: float32 (CPU without AMX)" in caplog.messages
    saved = saved_states("x")
    assert saved["Config"]["runner"]["precision"] == "float32"
    assert saved["Upstream_Config"]["teacher_precision"] == "float32"
    about = saved["EKD"]["about"]
    assert about["precision"] == about["config"]["teacher_precision"] == "float32"
    amx(True)
    caplog.clear()
    code, output = pretrain_with("x", "-a", "-o", "config.runner.total_steps=4")
    assert code == 0, output
    assert any(text.startswith("precision: float32 ") for text in caplog.messages)
    saved = saved_states("x")
    assert saved["Step"] == 4 and saved["Config"]["runner"]["precision"] == "float32"
    assert saved["Upstream_Config"]["teacher_precision"] == "float32"


def test_another_precision_on_resume(pretrain_with, pretrain_folder, amx, caplog):
    caplog.set_level("INFO")
    assert pretrain_with("x", precision="float32", **SHORT)[0] == 0
    text = "config.runner.total_steps=4,,config.runner.precision='bfloat16'"
    code, output = pretrain_with("x", "-a", "-o", text)
    assert code == 0, output
    assert any("runner.precision 'float32' -> 'bfloat16'" in text for text in caplog.messages)
    saved = saved_states("x")
    assert saved["Config"]["runner"]["precision"] == "bfloat16"
    assert all(w.dtype == torch.float32 for w in saved["EKD"]["student"].values())


def test_the_student_computes_in_bfloat16(pretrain_with, pretrain_folder, amx, monkeypatch):
    """By autocast on a CPU: its products, neither weights nor loss."""
    dtypes, original = set(), torch.nn.functional.linear

    def linear(x, weight, bias=None):
        out = original(x, weight, bias)
        dtypes.add((weight.dtype, out.dtype))
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    amx(True)
    assert pretrain_with("x", precision="auto", **SHORT)[0] == 0
    assert (torch.float32, torch.bfloat16) in dtypes
    saved = saved_states("x")
    assert saved["Config"]["runner"]["precision"] == "bfloat16"
    assert all(w.dtype == torch.float32 for w in saved["EKD"]["student"].values())
    assert saved["EKD_Run"]["skipped"] == 0


def test_float16_without_cuda(pretrain_with, pretrain_folder, caplog):
    """A new run trains in float32; a run that has trained in float16 is not continued."""
    assert pretrain_with("x", precision="float16", **SHORT)[0] == 0
    assert any(re.search(r"runner\.precision.*float16.*CUDA", text) for text in caplog.messages)
    more = ("-a", "-o", "config.runner.total_steps=4")  # with the same file, the run goes on
    assert pretrain_with("same", precision="float16", **SHORT)[0] == 0
    assert pretrain_with("same", *more, precision="float16")[0] == 0
    path = pretrain_folder / "result/pretrain/x/states-3.ckpt"
    states = saved_states("x")
    assert states["Config"]["runner"]["precision"] == "float32"
    states["Config"]["runner"]["precision"] = "float16"
    torch.save(states, "new.ckpt")  # not in place, because the tensors are memory-mapped
    shutil.move("new.ckpt", path)
    shutil.copy(path, path.with_name("last.ckpt"))
    for file in path.parent.glob("*.sha256"):
        file.unlink()
    argv = ("-a", "-o", "config.runner.total_steps=4")
    code, output = pretrain_with("x", *argv, precision="float16")
    assert code == 2 and re.search(r"error: runner\.precision.*float16.*CUDA.*-o ", output)
    argv = ("-a", "-o", "config.runner.total_steps=4,,config.runner.precision='float32'")
    code, output = pretrain_with("x", *argv)
    assert code == 0, output


def test_tf32_without_cuda_is_float32(pretrain_with, caplog):
    assert pretrain_with("x", precision="tf32", **SHORT)[0] == 0
    assert any(re.search(r"runner\.precision.*tf32.*CUDA", text) for text in caplog.messages)
    assert saved_states("x")["Config"]["runner"]["precision"] == "float32"


def test_a_cache_has_the_precision_of_its_teachers(
    pretrain_folder, teachers, corpus, amx, capsys, tmp_path
):
    """``auto`` is resolved when a cache is built; a run with ``auto`` takes the cache's."""
    configs(pretrain_folder, teachers, corpus, teacher_precision="auto")
    amx(True)
    assert cache(pretrain_folder, tmp_path / "half") == 0
    assert "teachers in bfloat16 (CPU with AMX)" in capsys.readouterr().out
    amx(False)
    expert = adapter(pretrain_folder, target_cache=str(tmp_path / "half"))
    assert expert.settings.teacher_precision == "bfloat16"
    change_model(teacher_precision="float32")
    with pytest.raises(Exception, match=r"teacher_precision is float32.*bfloat16"):
        adapter(pretrain_folder, target_cache=str(tmp_path / "half"))


def test_s3prls_teachers_compute_in_float32(pretrain_folder, teachers, corpus, amx, tmp_path):
    configs(pretrain_folder, teachers, corpus, teacher_precision="auto", teacher_backend="s3prl")
    amx(True)
    assert cache(pretrain_folder, tmp_path / "cache") == 0
    expert = adapter(pretrain_folder, target_cache=str(tmp_path / "cache"))
    assert expert.settings.teacher_precision == "float32"
    assert adapter(pretrain_folder).settings.teacher_precision == "float32"
