"""Export to transformers' HubertModel, and import from a Hugging Face folder."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import s3prl_ekd
from s3prl_ekd.cli import main
from s3prl_ekd.distill.aggregation import AGGREGATIONS, TeacherShape
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.settings import DistillSettings, TeacherSettings
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.export.folder import export_folder
from s3prl_ekd.export.huggingface import (
    check_hf_export,
    hf_config,
    save_hf_model,
    to_hf_model,
)
from s3prl_ekd.export.model_card import how_made
from s3prl_ekd.files.config import to_plain_data
from s3prl_ekd.student_file import LoadedStudent, load_student, write_student
from s3prl_ekd.teachers.hf_student import load_hf_student

from .conftest import error_of
from .students import VARIANTS, random_student


@pytest.fixture
def write(student_settings, tmp_path):
    """Writes a student file and returns its path."""

    def write(about=None, **changes):
        student = random_student(dataclasses.replace(student_settings, **changes))
        specs = AGGREGATIONS["separate"]({"t": TeacherShape(((4,),), 48)}).specs
        loaded = LoadedStudent(student, PredictionHeads(48, specs), specs, about or {})
        write_student(loaded, tmp_path / "student.pt")
        return tmp_path / "student.pt"

    return write


def load_upstream(path):
    """The upstream as s3prl's hub builds it."""
    from s3prl import hub

    s3prl_ekd.register()
    return hub.ekd_student(ckpt=str(path)).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_equal_those_of_the_upstream(write, waves, tmp_path, variant):
    path, out = write(**VARIANTS[variant]), tmp_path / "hf"
    assert main(["export", "hf", str(path), "-o", str(out)]) == 0
    model = AutoModel.from_pretrained(out).eval()
    assert type(model) is HubertModel
    prepare = AutoFeatureExtractor.from_pretrained(out)
    batch = prepare(
        [wave.numpy() for wave in waves], sampling_rate=16000, padding=True, return_tensors="pt"
    )
    upstream = load_upstream(path)
    with torch.no_grad():
        hf_output = model(**batch, output_hidden_states=True)
        states = upstream(waves)["hidden_states"]
        lengths = torch.tensor([len(wave) for wave in waves])
        student_output = upstream.student(pad_sequence(waves, batch_first=True), lengths)
        projected = model.feature_projection(
            model.feature_extractor(batch["input_values"]).transpose(1, 2)
        )
    assert len(hf_output.hidden_states) == len(states)
    # transformers 4 applies the final norm to the last of hidden_states if layer_norm_first
    comparable = slice(1, -1) if VARIANTS[variant].get("layer_norm_first") else slice(1, None)
    for state, hf_state in zip(
        states[comparable], hf_output.hidden_states[comparable], strict=True
    ):
        assert state.abs().max() > 0.1
        assert torch.allclose(state, hf_state, rtol=0, atol=1e-5)
    assert torch.allclose(student_output.last, hf_output.last_hidden_state, rtol=0, atol=1e-5)
    assert (student_output.mask == 0).any()
    masked = projected * student_output.mask[..., None]
    assert torch.allclose(states[0], masked, rtol=0, atol=1e-5)
    # hidden_states[0] of transformers differs, as the card explains
    assert not torch.allclose(states[0], hf_output.hidden_states[0], atol=1e-2)


def test_the_default_student_has_the_size_of_distilhubert():
    """Compare with the published configuration of ntu-spml/distilhubert."""
    config = hf_config(StudentSettings())
    expected = {
        "model_type": "hubert",
        "feat_proj_layer_norm": False,
        "feat_extract_norm": "group",
        "do_stable_layer_norm": False,
        "conv_bias": False,
        "num_hidden_layers": 2,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_conv_pos_embeddings": 128,
        "num_conv_pos_embedding_groups": 16,
        "conv_dim": [512] * 7,
        "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
        "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert sum(p.numel() for p in HubertModel(config).parameters()) == 23_491_200


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_keeps_weights_bit_for_bit(write, tmp_path, variant):
    path = write(**VARIANTS[variant])
    main(["export", "hf", str(path), "-o", str(tmp_path / "hf")])
    original, restored = load_student(path), load_hf_student(tmp_path / "hf")
    assert restored.heads is None and not restored.student.training
    weights, restored_weights = original.student.state_dict(), restored.student.state_dict()
    assert weights.keys() == restored_weights.keys()
    assert all(torch.equal(weights[name], restored_weights[name]) for name in weights)
    layers = {"extractor_conv_feature_layers": ""}  # the same layers, as a different text
    default = {"feature_grad_mult": 0.1}  # has no counterpart in transformers
    assert original.student.settings.conv_layers == restored.student.settings.conv_layers
    assert {**to_plain_data(restored.student.settings), **layers} == {
        **to_plain_data(original.student.settings),
        **layers,
        **default,
    }


def distilhubert(folder, **changes):
    """Write a folder with transformers, including the mask embedding of published folders."""
    torch.manual_seed(3)
    settings = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "conv_dim": [32] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "feat_proj_layer_norm": False,
        **changes,
    }
    model = HubertModel(HubertConfig(**settings)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("names", ["parametrizations", "weight_g", "prefix"])
def test_a_distilhubert_folder_becomes_a_student(waves, tmp_path, names):
    model = distilhubert(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    assert "masked_spec_embed" in weights
    if names == "weight_g":  # weight norm before torch 2.0, as in published folders
        for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
            key = f"encoder.pos_conv_embed.conv.parametrizations.weight.{new}"
            weights[f"encoder.pos_conv_embed.conv.{old}"] = weights.pop(key)
    if names == "prefix":  # of a model with a task head
        weights = {f"hubert.{name}": value for name, value in weights.items()}
    save_file(weights, file, {"format": "pt"})
    loaded = load_hf_student(tmp_path / "hf")
    assert loaded.about["source"].split()[-1] == "hf"

    write_student(loaded, tmp_path / "student.pt")
    upstream = load_upstream(tmp_path / "student.pt")
    batch = pad_sequence(waves, batch_first=True)
    mask = torch.arange(batch.shape[1])[None] < torch.tensor([[len(wave)] for wave in waves])
    with torch.no_grad():
        output = model(batch, attention_mask=mask.long(), output_hidden_states=True)
        states = upstream(waves)["hidden_states"]
    for state, hf_state in zip(states[1:], output.hidden_states[1:], strict=True):
        assert torch.allclose(state, hf_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"conv_bias": True}, ("conv_bias", "True")),
        ({"conv_pos_batch_norm": True}, ("conv_pos_batch_norm", "True")),
        ({"layer_norm_eps": 1e-4}, ("layer_norm_eps", "0.0001")),
        ({"layer_norm_eps": 1e-4, "feat_proj_layer_norm": True}, ("layer_norm_eps", "0.0001")),
        ({"feat_extract_activation": "relu"}, ("feat_extract_activation", "relu")),
        ({"hidden_act": "gelu_new"}, ("activation_fn", "gelu_new")),
        ({"hidden_size": 32, "num_attention_heads": 4}, ("identity",)),
    ],
)
def test_other_architectures_are_an_error(tmp_path, changes, parts):
    distilhubert(tmp_path / "hf", **changes)
    with pytest.raises(CheckpointError) as error:
        load_hf_student(tmp_path / "hf")
    assert all(part in str(error.value) for part in (*parts, str(tmp_path / "hf")))
    assert "\n" not in str(error.value)


def test_normalised_waveforms(tmp_path, caplog):
    """do_normalize is a warning under a group norm, which nearly undoes it; else an error."""
    distilhubert(tmp_path / "group")
    settings = json.dumps({"do_normalize": True, "sampling_rate": 16000})
    (tmp_path / "group" / "preprocessor_config.json").write_text(settings)
    load_hf_student(tmp_path / "group")
    assert "do_normalize" in caplog.text and str(tmp_path / "group") in caplog.text
    distilhubert(tmp_path / "layer", feat_extract_norm="layer")
    with pytest.raises(CheckpointError, match="do_normalize"):
        load_hf_student(tmp_path / "layer")
    (tmp_path / "layer" / "preprocessor_config.json").write_text('{"do_normalize": false}')
    load_hf_student(tmp_path / "layer")


def test_folders_without_a_student(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_hf_student(tmp_path)
    distilhubert(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_hf_student(tmp_path / "hf")
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    Wav2Vec2Model(config).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"\bwav2vec2\b.*\bhubert\b"):
        load_hf_student(tmp_path / "other")


@pytest.mark.parametrize(
    "name",
    ["encoder.layers.1.feed_forward.output_dense.bias", "feature_projection.projection.bias"],
)
def test_wrong_weights_are_detected(student_settings, tmp_path, name):
    student = random_student(student_settings)
    folder = tmp_path / "hf"
    save_hf_model(to_hf_model(student), folder)
    assert check_hf_export(folder, student) <= 1e-5
    weights = load_file(folder / "model.safetensors")
    weights[name][3] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"\d\.\de-0\d\b.*\b1e-05\b"):
        check_hf_export(folder, student)


def test_folder_and_card(write, tmp_path, capsys):
    teachers = {
        "hubert": TeacherSettings("hubert_base"),
        "mine": TeacherSettings("/home/somebody/secret/wavlm.pt", (2, 4)),
    }
    about = {
        "config": to_plain_data(DistillSettings(teachers)),
        "step": 1234,
        "made_by": "s3prl_ekd 9",
    }
    path, out = write(about), tmp_path / "named"
    argv = ["export", "hf", str(path), "-o", str(out)]
    main(argv)
    assert f"AutoModel.from_pretrained(sys.argv[1]))' {out}\n" in capsys.readouterr().out
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert {file.name for file in out.iterdir()} == names
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1
    weights = load_file(out / "model.safetensors")
    count = sum(value.numel() for value in weights.values())
    card = (out / "README.md").read_text()
    for line in (
        "# named",
        f"{count:,} parameters",
        "teacher `hubert`: `hubert_base`, layers [4, 8, 12]",
        "teacher `mine`: `wavlm.pt`, layers [2, 4]",
        "aggregation of the teachers: separate",
        "updates: 1234",
        "at least 400 samples",
        "320 samples (20 ms)",
    ):
        assert line in card
    assert "secret" not in card and str(tmp_path) not in card
    empty = how_made({})
    assert empty and "- " not in empty
    data = {"sets": ["a", "b"], "train_batch_size": 24, "max_seconds": 160.0}
    assert how_made({"data": data}) == "- data: a, b (batches of at most 24 utterances)"
    for invalid in (None, 3, {"sets": "a"}, {"sets": [], "train_batch_size": 3}, {"sets": ["a"]}):
        assert how_made({"data": invalid}) == empty
    for average in (3, [1], "hubert"):  # a damaged file
        assert "first weights: " in how_made({"config": {"init": {"average": average}}})

    error = error_of(capsys, *argv)  # the folder exists
    assert "--force" in error and str(out) in error
    (out / "README.md").write_text("old")
    assert main([*argv, "--force"]) == 0
    assert (out / "README.md").read_text() == card
    (out / "notes.txt").write_text("a user's file")
    assert "notes.txt" in error_of(capsys, *argv, "--force")
    assert (out / "notes.txt").read_text() == "a user's file"
    assert not list(tmp_path.glob(".*"))


def test_an_export_folder_is_written_atomically(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), export_folder(out, False, ()) as folder:
        (folder / "partial").touch()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    out.mkdir()
    with export_folder(out, False, ()) as folder:  # an empty folder may exist
        (folder / "a").touch()
    assert [file.name for file in out.iterdir()] == ["a"]
    with (
        pytest.raises(CheckpointError, match=re.escape(str(out / "a"))),
        export_folder(out / "a", True, ()),
    ):
        pass
    shutil.rmtree(out)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "file" / "out"))):
        with export_folder(tmp_path / "file" / "out", False, ()):
            pass


@pytest.mark.parametrize("name", ["gone.pt", "text.pt", "."])
def test_files_without_a_student(tmp_path, capsys, name):
    (tmp_path / "text.pt").write_text("no torch file")
    error = error_of(capsys, "export", "hf", tmp_path / name, "-o", tmp_path / "out")
    assert str(tmp_path / name) in error
    assert not (tmp_path / "out").exists()


def test_the_command_converts_a_hugging_face_folder_to_a_student_file(write, tmp_path, capsys):
    path, out = write(), tmp_path / "restored.pt"
    main(["export", "hf", str(path), "-o", str(tmp_path / "hf")])
    main(["export", "student", str(tmp_path / "hf"), "-o", str(out)])
    assert str(out) in capsys.readouterr().out
    original, restored = load_student(path), load_student(out)
    assert original.heads is not None and restored.heads is None
    weights, restored_weights = original.student.state_dict(), restored.student.state_dict()
    assert all(torch.equal(weights[name], restored_weights[name]) for name in weights)
