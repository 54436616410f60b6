"""Export to ONNX. Tests that need onnxruntime are skipped if it is not installed."""

import copy
import dataclasses
import importlib.util
import re
import sys

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from s3prl_ekd.cli import main
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.export.onnx import (
    OnnxSession,
    OnnxStudent,
    TimeNorm,
    check,
    onnx_bytes,
    quantised,
    real_time_factors,
    relative_errors,
)
from s3prl_ekd.student_file import LoadedStudent, write_student

from .students import VARIANTS, random_student

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")),
    reason="onnx and onnxruntime are not installed (the extra onnx)",
)


@pytest.fixture
def make(student_settings):
    """Makes a student with random weights, norms included."""

    def make(variant="default", seed=0):
        settings = dataclasses.replace(student_settings, **VARIANTS[variant])
        return random_student(settings, seed)

    return make


def batch(*counts, offset=0.0):
    generator = torch.Generator().manual_seed(sum(counts))
    waves = [offset + 0.1 * torch.randn(count, generator=generator) for count in counts]
    return pad_sequence(waves, batch_first=True), torch.tensor(counts)


BATCHES = [batch(400), batch(719), batch(33_333), batch(24_000, 720, 8000, 401)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_traced_module_equals_the_student(make, variant):
    """Needs no onnx: only the module that is traced."""
    student = make(variant)
    traced = OnnxStudent(student).eval()
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    for waves, lengths in BATCHES:
        with torch.no_grad():
            out = student(waves, lengths)
            states, frames = traced(waves, lengths)
        assert states.shape == (len(out.hidden_states), *out.hidden_states[0].shape)
        assert torch.allclose(states, torch.stack(out.hidden_states), atol=2e-5)
        assert frames.tolist() == out.mask.sum(1).int().tolist()
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("frames", [1, 63, 64, 65, 1000])
def test_the_norm_over_time_equals_group_norm(frames):
    norm = torch.nn.GroupNorm(6, 6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 3 + torch.randn(2, 6, frames, generator=torch.Generator().manual_seed(frames))
    with torch.no_grad():
        exact = copy.deepcopy(norm).double()(x.double()).float()
        assert torch.allclose(TimeNorm(norm)(x), exact, atol=2e-5)
        # the mean of 0, 1, ..., frames - 1
        count = torch.arange(frames, dtype=torch.float32).expand(1, 1, -1)
        assert TimeNorm(norm).mean(count).item() == pytest.approx((frames - 1) / 2, abs=1e-4)


@needs_onnx
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_graph_equals_torch_at_other_sizes_than_traced(make, variant):
    student = make(variant)
    run = OnnxSession(onnx_bytes(student), 1)
    assert check(student, run) < 2e-5
    for waves, lengths in [*BATCHES, batch(16_000, 4000, offset=0.3)]:
        with torch.no_grad():
            out = student(waves, lengths)
        states, frames = run(waves, lengths)
        assert states.dtype == np.float32 and frames.dtype == np.int64
        for torch_state, onnx_state in zip(out.hidden_states, states, strict=True):
            assert np.abs(torch_state.numpy() - onnx_state).max() < 1e-4
        assert frames.tolist() == out.mask.sum(1).int().tolist()


@needs_onnx
@pytest.mark.parametrize("opset", (17, 18, 19, 20))
def test_opsets(make, opset):
    import onnx

    graph = onnx_bytes(make(), opset)
    assert [o.version for o in onnx.load_from_string(graph).opset_import if not o.domain] == [opset]
    assert check(make(), OnnxSession(graph, 1)) < 2e-5


@needs_onnx
def test_padding_is_masked(make):
    """Without GroupNorm, a padded utterance has the hidden states of the utterance alone."""
    student = make("layer norm")
    run = OnnxSession(onnx_bytes(student), 1)
    waves, lengths = batch(16_000, 8000)
    padded, frames = run(waves, lengths)
    alone, _ = run(waves[1:, :8000], lengths[1:])
    assert frames.tolist() == [49, 24] and alone.shape[2] == 24
    assert np.abs(padded[:, 1, :24] - alone[:, 0]).max() < 1e-5
    assert np.abs(padded[0, 1, 24:]).max() == 0  # projected features of padding
    unmasked, _ = run(waves, torch.tensor([16_000, 16_000]))
    assert np.abs(unmasked[-1, 1, :24] - padded[-1, 1, :24]).max() > 1e-3


@needs_onnx
def test_the_graph_of_another_student_is_an_error(make):
    run = OnnxSession(onnx_bytes(make(seed=1)), 1)
    with pytest.raises(CheckpointError, match=r"\b1600\b.*\b1e-04\b"):
        check(make(), run)


@needs_onnx
def test_int8(make):
    import onnx

    student = make()
    graph = onnx_bytes(student)
    int8_graph = quantised(graph)
    op_types = [node.op_type for node in onnx.load_from_string(int8_graph).graph.node]
    layers = 2 * 6 + 1  # q, k, v, out, fc1, fc2 of each layer, and the projection
    assert op_types.count("MatMulInteger") == layers
    assert op_types.count("Conv") == 8 and "ConvInteger" not in op_types
    assert op_types.count("MatMul") == 2 * 2  # attention scores and weighted sums have no weights
    weights = onnx.load_from_string(int8_graph).graph.initializer
    assert sum(w.data_type == onnx.TensorProto.INT8 and len(w.dims) == 2 for w in weights) == layers
    assert len(int8_graph) < len(graph)
    errors = relative_errors(student, OnnxSession(int8_graph, 1))
    assert all(1e-5 < error < 0.04 for error in errors)  # 0.07 and more if sums saturate
    assert max(relative_errors(student, OnnxSession(graph, 1))) < 1e-5


def test_functions_are_timed_in_alternation():
    calls = []
    factors = real_time_factors(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=2.0, repeats=3
    )
    assert calls == ["a", "b"] * 4  # the first round is a warm-up
    assert {name: len(values) for name, values in factors.items()} == {"a": 3, "b": 3}


@pytest.fixture
def student_file(make, tmp_path):
    path = tmp_path / "student.pt"
    write_student(LoadedStudent(make(), None, {}, {}), path)
    return path


@needs_onnx
def test_the_command(student_file, make, tmp_path, capsys):
    import onnx

    out = tmp_path / "new" / "model.onnx"
    argv = ["export", "onnx", str(student_file), "-o", str(out)]
    assert main([*argv, "--int8"]) == 0
    report = capsys.readouterr().out
    for name in ("model.onnx", "model.int8.onnx"):
        assert re.search(rf"{name}: \d+\.\d MB, \d+\.\d\d\b.* \d\.\de-\d\d\b", report)
    assert {file.name for file in out.parent.iterdir()} == {"model.onnx", "model.int8.onnx"}
    check(make(), OnnxSession(out.read_bytes(), 1))
    metadata = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert metadata["sample_rate"] == "16000" and metadata["stride"] == "320"
    assert metadata["min_samples"] == "400"
    inputs = [
        (i.name, [d.dim_param for d in i.type.tensor_type.shape.dim])
        for i in onnx.load(out).graph.input
    ]
    assert inputs == [("waves", ["batch", "sample"]), ("lengths", ["batch"])]

    out.unlink()
    with pytest.raises(SystemExit) as stop:  # the second file exists
        main([*argv, "--int8"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "model.int8.onnx" in error and "--force" in error
    assert not out.exists()
    assert main([*argv, "--opset", "18"]) == 0
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--opset", "9"])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert re.search(r"--opset.*(?<![\w.])9(?![\w.])", error.splitlines()[-1])


def test_without_the_extra(student_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SystemExit) as stop:
        main(["export", "onnx", str(student_file), "-o", str(tmp_path / "m.onnx")])
    assert stop.value.code == 2
    assert "pip install onnx onnxruntime" in capsys.readouterr().err
    assert not (tmp_path / "m.onnx").exists()
