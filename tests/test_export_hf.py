"""A student as transformers' HubertModel, and a Hugging Face folder as a student."""

import dataclasses
import json
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
    WavLMConfig,
    WavLMModel,
)

import s3prl_ekd
from s3prl_ekd.cli import main
from s3prl_ekd.distill.aggregation import AGGREGATIONS, TeacherShape
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.settings import DistillSettings, StudentSettings, TeacherSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.export.folder import whole_folder
from s3prl_ekd.export.huggingface import (
    check_folder,
    hubert_config,
    load_hf_student,
    save_hubert,
    to_hubert,
)
from s3prl_ekd.export.model_card import how_made
from s3prl_ekd.files.config import plain
from s3prl_ekd.student_file import LoadedStudent, load_student, write_student

KINDS = {
    "default": {},
    "norm first": {"layer_norm_first": True, "activation_fn": "relu"},
    "layer norm": {"extractor_mode": "layer_norm", "conv_pos": 15, "encoder_layers": 1},
    "no projection": {"extractor_conv_feature_layers": "[(48,10,5)] + [(48,3,2)] * 4"},
}


def random_student(settings, seed=0):
    """A student whose norms do something, as trained ones do."""
    torch.manual_seed(seed)
    student = Student(settings).eval()
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm)):
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.3)
    return student


@pytest.fixture
def write(student_settings, tmp_path):
    def write(about=None, **changes):
        student = random_student(dataclasses.replace(student_settings, **changes))
        specs = AGGREGATIONS["separate"]({"t": TeacherShape(((4,),), 48)}).specs
        loaded = LoadedStudent(student, PredictionHeads(48, specs), specs, about or {})
        write_student(loaded, tmp_path / "student.pt")
        return tmp_path / "student.pt"

    return write


def hub_entry(path):
    from s3prl import hub

    s3prl_ekd.register()
    return hub.ekd_student(ckpt=str(path)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_equal_the_upstreams(write, waves, tmp_path, kind):
    path, out = write(**KINDS[kind]), tmp_path / "hf"
    assert main(["export", "hf", str(path), "-o", str(out)]) == 0
    model = AutoModel.from_pretrained(out).eval()
    assert type(model) is HubertModel
    prepare = AutoFeatureExtractor.from_pretrained(out)
    batch = prepare(
        [wave.numpy() for wave in waves], sampling_rate=16000, padding=True, return_tensors="pt"
    )
    upstream = hub_entry(path)
    with torch.no_grad():
        theirs = model(**batch, output_hidden_states=True)
        ours = upstream(waves)["hidden_states"]
        lengths = torch.tensor([len(wave) for wave in waves])
        out = upstream.student(pad_sequence(waves, batch_first=True), lengths)
        projected = model.feature_projection(
            model.feature_extractor(batch["input_values"]).transpose(1, 2)
        )
    assert len(theirs.hidden_states) == len(ours)
    # the last of hidden_states is another in transformers 4 where the layers normalise first
    same = slice(1, -1) if KINDS[kind].get("layer_norm_first") else slice(1, None)
    for mine, other in zip(ours[same], theirs.hidden_states[same], strict=True):
        assert mine.abs().max() > 0.1
        assert torch.allclose(mine, other, rtol=0, atol=1e-6)
    assert torch.allclose(out.last, theirs.last_hidden_state, rtol=0, atol=1e-6)
    assert (out.mask == 0).any()
    assert torch.allclose(ours[0], projected * out.mask[..., None], rtol=0, atol=1e-6)
    # what transformers calls 0 is something else, as the card says
    assert not torch.allclose(ours[0], theirs.hidden_states[0], atol=1e-2)


def test_the_default_size_is_distilhuberts():
    """Published numbers of ntu-spml/distilhubert's architecture, and of no other HuBERT."""
    config = hubert_config(StudentSettings())
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


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_the_weights_are_the_same_bits(write, tmp_path, kind):
    path = write(**KINDS[kind])
    main(["export", "hf", str(path), "-o", str(tmp_path / "hf")])
    back, before = load_hf_student(tmp_path / "hf"), load_student(path)
    assert back.heads is None and not back.student.training
    mine, other = before.student.state_dict(), back.student.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    text = {"extractor_conv_feature_layers": ""}  # the same layers, written otherwise
    fixed = {"feature_grad_mult": 0.1}
    assert before.student.settings.conv_layers == back.student.settings.conv_layers
    assert {**plain(back.student.settings), **text} == {
        **plain(before.student.settings),
        **text,
        **fixed,
    }


def distilhubert(folder, **changes):
    """A folder as transformers writes it, with the mask embedding that published ones have."""
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


@pytest.mark.parametrize("names", ["new", "old", "with a prefix"])
def test_a_distilhubert_folder_becomes_a_student(waves, tmp_path, names):
    model = distilhubert(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    assert "masked_spec_embed" in weights
    if names == "old":  # of weight norm before torch 2.0, which published folders have
        for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
            key = f"encoder.pos_conv_embed.conv.parametrizations.weight.{new}"
            weights[f"encoder.pos_conv_embed.conv.{old}"] = weights.pop(key)
    if names == "with a prefix":  # of a model with a task's head
        weights = {f"hubert.{name}": value for name, value in weights.items()}
    save_file(weights, file, {"format": "pt"})
    loaded = load_hf_student(tmp_path / "hf")
    assert loaded.about["source"] == "the Hugging Face folder hf"

    write_student(loaded, tmp_path / "student.pt")
    upstream = hub_entry(tmp_path / "student.pt")
    batch = pad_sequence(waves, batch_first=True)
    mask = torch.arange(batch.shape[1])[None] < torch.tensor([[len(wave)] for wave in waves])
    with torch.no_grad():
        theirs = model(batch, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        ours = upstream(waves)["hidden_states"]
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"feat_proj_layer_norm": True}, "feat_proj_layer_norm is True"),
        ({"conv_bias": True}, "conv_bias is True"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm is True"),
        ({"layer_norm_eps": 1e-4}, "layer_norm_eps is 0.0001"),
        ({"feat_extract_activation": "relu"}, "feat_extract_activation is relu"),
        ({"hidden_act": "gelu_new"}, "activation_fn"),
        ({"hidden_size": 32, "num_attention_heads": 4}, "not the identity"),
    ],
)
def test_a_model_that_is_no_student_is_a_sentence(tmp_path, changes, sentence):
    distilhubert(tmp_path / "hf", **changes)
    with pytest.raises(CheckpointError, match=sentence) as error:
        load_hf_student(tmp_path / "hf")
    assert "\n" not in str(error.value)


def test_normalised_waveforms(tmp_path, caplog):
    """A student takes waveforms as they are; under a group norm that is nearly the same."""
    distilhubert(tmp_path / "group")
    settings = json.dumps({"do_normalize": True, "sampling_rate": 16000})
    (tmp_path / "group" / "preprocessor_config.json").write_text(settings)
    load_hf_student(tmp_path / "group")
    assert "made with normalised waveforms" in caplog.text
    distilhubert(tmp_path / "layer", feat_extract_norm="layer")
    with pytest.raises(CheckpointError, match="wants normalised waveforms"):
        load_hf_student(tmp_path / "layer")
    (tmp_path / "layer" / "preprocessor_config.json").write_text('{"do_normalize": false}')
    load_hf_student(tmp_path / "layer")


def test_folders_that_are_something_else(tmp_path):
    with pytest.raises(CheckpointError, match="without a config.json"):
        load_hf_student(tmp_path)
    distilhubert(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is a pickle"):
        load_hf_student(tmp_path / "hf")
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    WavLMModel(config).save_pretrained(tmp_path / "wavlm")
    with pytest.raises(CheckpointError, match="of type wavlm; a student is a hubert"):
        load_hf_student(tmp_path / "wavlm")


@pytest.mark.parametrize(
    "name",
    ["encoder.layers.1.feed_forward.output_dense.bias", "feature_projection.projection.bias"],
)
def test_a_folder_that_gives_something_else_is_found_out(student_settings, tmp_path, name):
    student = random_student(student_settings)
    folder = tmp_path / "hf"
    save_hubert(to_hubert(student), folder)
    assert check_folder(folder, student) <= 1e-6
    weights = load_file(folder / "model.safetensors")
    weights[name][3] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="away from the student"):
        check_folder(folder, student)


def test_folder_and_card(write, tmp_path, capsys):
    teachers = {
        "hubert": TeacherSettings("hubert_base"),
        "mine": TeacherSettings("/home/somebody/secret/wavlm.pt", (2, 4)),
    }
    about = {"config": plain(DistillSettings(teachers)), "step": 1234, "made_by": "s3prl_ekd 9"}
    path, out = write(about), tmp_path / "named"
    words = ["export", "hf", str(path), "-o", str(out)]
    main(words)
    said = capsys.readouterr().out
    assert "AutoModel.from_pretrained" in said and "heads left out" in said
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert {file.name for file in out.iterdir()} == names
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1
    weights = load_file(out / "model.safetensors")
    count = sum(value.numel() for value in weights.values())
    card = (out / "README.md").read_text()
    for text in (
        "# named",
        f"{count:,} parameters",
        "teacher `hubert`: `hubert_base`, layers [4, 8, 12]",
        "teacher `mine`: `wavlm.pt`, layers [2, 4]",
        "aggregation of the teachers: separate",
        "updates: 1234",
        "at least 400 samples",
        "320 samples (20 ms)",
    ):
        assert text in card
    assert "secret" not in card and str(tmp_path) not in card
    assert how_made({}) == "The student file does not say."
    data = {"sets": ["a", "b"], "train_batch_size": 24, "max_seconds": 160.0}
    assert how_made({"data": data}) == "- data: a, b (batches of at most 24 utterances)"
    for odd in (None, 3, {"sets": "a"}, {"sets": [], "train_batch_size": 3}, {"sets": ["a"]}):
        assert how_made({"data": odd}) == "The student file does not say."

    with pytest.raises(SystemExit):  # it is there
        main(words)
    assert "add --force" in capsys.readouterr().err
    (out / "README.md").write_text("old")
    assert main([*words, "--force"]) == 0
    assert (out / "README.md").read_text() == card
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main([*words, "--force"])
    assert "holds notes.txt" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))


def test_a_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), whole_folder(out, False, ()) as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    out.mkdir()
    with whole_folder(out, False, ()) as folder:  # an empty folder is not in the way
        (folder / "a").touch()
    assert [file.name for file in out.iterdir()] == ["a"]
    with pytest.raises(CheckpointError, match="is a file"), whole_folder(out / "a", True, ()):
        pass
    shutil.rmtree(out)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        with whole_folder(tmp_path / "file" / "out", False, ()):
            pass


def test_what_is_no_student(tmp_path, capsys):
    (tmp_path / "text.pt").write_text("no torch file")
    for given, sentence in (("gone.pt", "no such file"), ("text.pt", "is damaged"), (".", "no ")):
        with pytest.raises(SystemExit) as left:
            main(["export", "hf", str(tmp_path / given), "-o", str(tmp_path / "out")])
        assert left.value.code == 2 and sentence in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_folder_becomes_a_student_file_by_the_command(write, tmp_path, capsys):
    path, out = write(), tmp_path / "back.pt"
    main(["export", "hf", str(path), "-o", str(tmp_path / "hf")])
    main(["export", "student", str(tmp_path / "hf"), "-o", str(out)])
    assert "heads dropped" in capsys.readouterr().out
    before, back = load_student(path).student.state_dict(), load_student(out).student.state_dict()
    assert all(torch.equal(before[name], back[name]) for name in before)
