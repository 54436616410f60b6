"""Exports of copied and pruned students to transformers and ONNX."""

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    HubertConfig,
    HubertModel,
    WavLMConfig,
    WavLMModel,
)

from s3prl_ekd.cli import main
from s3prl_ekd.distill.settings import DistillSettings, TeacherSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import CopySettings, GateSettings, PruningSettings
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.export.huggingface import (
    check_hf_export,
    hf_config,
    save_hf_model,
    to_hf_model,
)
from s3prl_ekd.export.model_card import how_made
from s3prl_ekd.export.onnx import OnnxSession, check, onnx_bytes, quantised, relative_errors
from s3prl_ekd.export.padding import padded, padded_settings
from s3prl_ekd.files.config import to_plain_data
from s3prl_ekd.student_file import LoadedStudent, load_student, write_student
from s3prl_ekd.teachers.hf_student import load_hf_student

from .conftest import error_of
from .students import pruned_student

LARGE = {"extractor_mode": "layer_norm", "layer_norm_first": True, "normalize": True}
VARIANTS = {
    "HuBERT": {},
    "HuBERT Large": LARGE,
    "WavLM": {"wavlm": True},
    "WavLM Large": {"wavlm": True, **LARGE},
}
variants = pytest.mark.parametrize("variant", VARIANTS)
needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")),
    reason="onnx and onnxruntime are not installed (the extra onnx)",
)


@pytest.fixture
def write(tmp_path):
    """Writes a student file and returns its path."""

    def write(about=None, **variant):
        path = tmp_path / "pruned.pt"
        write_student(LoadedStudent(pruned_student(**variant), None, {}, about or {}), path)
        return path

    return write


def pad(waves):
    return pad_sequence(waves, batch_first=True), torch.tensor([len(wave) for wave in waves])


def run(student, waves):
    with torch.no_grad():
        return student(*pad(waves))


@variants
def test_padding_changes_no_hidden_state(waves, variant):
    student = pruned_student(**VARIANTS[variant])
    larger = padded(student)
    assert larger.settings.heads == ((0, 1, 2, 3),) * 3 and larger.settings.ffn_dims == (40,) * 3
    for state, own in zip(
        run(larger, waves).hidden_states, run(student, waves).hidden_states, strict=True
    ):
        assert torch.allclose(state, own, rtol=0, atol=5e-6)
    # head 2 of the first layer, the second of the two that are left, has rows and columns 24 to 35
    (first, *_), (own_first, *_) = larger.backbone.encoder.layers, student.backbone.encoder.layers
    attention, own = first.self_attn, own_first.self_attn
    assert torch.equal(attention.q_proj.weight[24:36], own.q_proj.weight[12:])
    assert torch.equal(attention.out_proj.weight[:, 24:36], own.out_proj.weight[:, 12:])
    for added in (slice(12, 24), slice(36, 48)):
        assert not attention.v_proj.weight[added].any()
        assert not attention.out_proj.weight[:, added].any()


def test_a_feed_forward_network_is_padded_to_at_least_one_unit():
    settings = dataclasses.replace(pruned_student().settings, ffn_dims=(0, 0, 0))
    assert padded_settings(settings).ffn_dims == (1, 1, 1)


def test_padded_attention_of_a_base_model_has_28_million_parameters():
    settings = dataclasses.replace(
        pruned_student().settings,
        encoder_embed_dim=768,
        encoder_attention_heads=12,
        heads=((5,),) * 12,
        ffn_dims=(2,) * 12,
    )
    with torch.device("meta"):
        model = HubertModel(hf_config(padded_settings(settings)))
    count = sum(p.numel() for name, p in model.named_parameters() if ".attention." in name)
    assert count == 12 * 4 * (768 * 768 + 768) == 28_348_416


@variants
def test_transformers_computes_the_hidden_states_of_the_student(write, waves, tmp_path, variant):
    path, out = write(**VARIANTS[variant]), tmp_path / "hf"
    assert main(["export", "hf", str(path), "-o", str(out)]) == 0
    model = AutoModel.from_pretrained(out).eval()
    assert type(model) is (WavLMModel if "WavLM" in variant else HubertModel)
    expected = run(load_student(path).student, waves)
    normalize = AutoFeatureExtractor.from_pretrained(out).do_normalize
    assert normalize == ("Large" in variant)
    inputs, lengths = pad([F.layer_norm(w, w.shape) for w in waves] if normalize else waves)
    mask = (torch.arange(inputs.shape[1])[None] < lengths[:, None]).long()
    with torch.no_grad():
        output = model(inputs, attention_mask=mask, output_hidden_states=True)
    states = [*output.hidden_states[:3], output.last_hidden_state]
    assert (expected.mask == 0).any()
    for state, own in zip(states, expected.hidden_states, strict=True):
        assert own.abs().max() > 0.5
        rounding = 1.5e-6 * float(own.abs().max())  # of float32; values are up to 8
        assert torch.allclose(state, own, rtol=0, atol=max(1e-5, rounding))


@variants
def test_a_folder_becomes_the_padded_student(write, tmp_path, variant):
    path, out = write(**VARIANTS[variant]), tmp_path / "hf"
    main(["export", "hf", str(path), "-o", str(out)])
    main(["export", "student", str(out), "-o", str(tmp_path / "again.pt")])
    again, expected = (
        load_student(tmp_path / "again.pt").student,
        padded(load_student(path).student),
    )
    assert again.settings == expected.settings
    weights, expected_weights = again.state_dict(), expected.state_dict()
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


@pytest.mark.parametrize("wavlm", [False, True])
def test_a_folder_of_transformers_becomes_a_copied_student(waves, tmp_path, wavlm):
    """The folder of a published architecture, which no export wrote, with a mask embedding."""
    torch.manual_seed(3)
    config = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "conv_dim": [32] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }
    model = WavLMModel(WavLMConfig(**config)) if wavlm else HubertModel(HubertConfig(**config))
    model.eval().save_pretrained(tmp_path)
    assert "masked_spec_embed" in load_file(tmp_path / "model.safetensors")
    student = load_hf_student(tmp_path).student
    inputs, lengths = pad(waves)
    mask = (torch.arange(inputs.shape[1])[None] < lengths[:, None]).long()
    with torch.no_grad():
        output = model(inputs, attention_mask=mask, output_hidden_states=True)
    for state, own in zip(output.hidden_states, run(student, waves).hidden_states, strict=True):
        assert torch.allclose(state, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("module", ["attention.out_proj", "final_layer_norm"])
def test_wrong_weights_are_detected(tmp_path, module):
    student = pruned_student()
    save_hf_model(to_hf_model(student), tmp_path)
    assert check_hf_export(tmp_path, student) <= 1e-5
    weights = load_file(tmp_path / "model.safetensors")
    weights[f"encoder.layers.1.{module}.bias"][3] += 1e-3
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"\d\.\de-0\d\b.*\b5e-05\b"):
        check_hf_export(tmp_path, student)


def test_students_that_are_refused(write, tmp_path, capsys):
    path = write(gates=GateSettings())
    for kind in ("hf", "onnx"):
        if kind == "hf" or importlib.util.find_spec("onnxruntime"):
            error = error_of(capsys, "export", kind, path, "-o", tmp_path / "out")
            assert f"s3prl-ekd prune {path} -o" in error
    error = error_of(capsys, "export", "hf", write(feature_scale=True), "-o", tmp_path / "out")
    assert "last_conv" in error
    assert not (tmp_path / "out").exists()


def test_report_and_card(write, tmp_path, capsys):
    teachers = {"mine": TeacherSettings("/home/somebody/wavlm.pt")}
    settings = DistillSettings(
        teachers, student=CopySettings("copy", "mine"), pruning=PruningSettings(sparsity=0.6)
    )
    path = write({"config": to_plain_data(settings)}, **VARIANTS["WavLM Large"])
    main(["export", "hf", str(path), "-o", str(tmp_path / "hf")])
    report = capsys.readouterr().out
    own = sum(value.numel() for value in load_student(path).student.parameters())
    count = sum(value.numel() for value in load_file(tmp_path / "hf/model.safetensors").values())
    card = (tmp_path / "hf" / "README.md").read_text()
    assert count > 1.1 * own and "export superb" in report
    for number in (f"{own:,} ", f"{count:,} parameters"):
        assert number in card and number.split()[0] in report
    for line in (
        "- wavlm",
        "20, 13, 24, 17, 9, 22, 19",
        "attention heads, of 4, by layer | 2, 0, 3 |",
        "feed-forward units, by layer | 40, 17, 0 |",
        "teacher `mine`: `wavlm.pt`",
        "a copy of the teacher `mine`",
        "target sparsity 0.6 of the parameters",
    ):
        assert line in card
    # padding that is not worth a line
    settings = dataclasses.replace(
        pruned_student().settings, heads=((0, 1, 2, 3),) * 3, ffn_dims=(40, 40, 38)
    )
    write_student(LoadedStudent(Student(settings).eval(), None, {}, {}), path)
    main(["export", "hf", str(path), "-o", str(tmp_path / "second")])
    assert "export superb" not in capsys.readouterr().out


def test_card_of_a_second_distillation():
    config = {"student": {"kind": "file", "file": "/home/somebody/pruned.pt"}}
    assert how_made({"config": config}) == "- first weights: the student file `pruned.pt`"


@needs_onnx
@pytest.mark.parametrize(
    "variant", [*VARIANTS.values(), {"feature_scale": True, "normalize": True}]
)
def test_the_graph_equals_torch_at_other_sizes_than_traced(variant):
    """Alone and in padded batches, for fewer frames than WavLM's distances have buckets (32), and
    for more than the largest distance (60)."""
    student = pruned_student(**variant)
    graph = OnnxSession(onnx_bytes(student), 1)
    assert check(student, graph) < 5e-5
    generator = torch.Generator().manual_seed(1)
    noise = [0.1 * torch.randn(n, generator=generator) for n in (400, 2000, 33_333)]
    offset = [0.3 + noise[2][:16_000], 0.3 + noise[1]]
    for group in ([noise[0]], [noise[2]], [*reversed(noise)], offset):
        expected = run(student, group)
        states, frames = graph(*pad(group))
        assert frames.tolist() == expected.mask.sum(1).int().tolist()
        for state, own in zip(states, expected.hidden_states, strict=True):
            assert np.abs(state - own.numpy()).max() < 1e-5 * max(1, own.abs().max().item())


@needs_onnx
def test_int8():
    import onnx

    student = pruned_student(wavlm=True)
    graph = onnx_bytes(student)
    int8_graph = quantised(graph)
    op_types = [node.op_type for node in onnx.load_from_string(int8_graph).graph.node]
    # The projection; q, k, v, out and the position gate of two layers; fc1 and fc2 of two layers.
    assert op_types.count("MatMulInteger") == 1 + 2 * 5 + 2 * 2
    assert all(
        1e-5 < error < 0.02 for error in relative_errors(student, OnnxSession(int8_graph, 1))
    )
