"""Teachers by path: every format gives s3prl's hidden states; unsupported files raise an error."""

import json
import logging
import re
import shutil

import pytest
import torch
from torch.nn.functional import layer_norm

from s3prl_ekd.data.audio import read_audio
from s3prl_ekd.data.audio_files import read_header
from s3prl_ekd.data.bad_audio import BadAudio
from s3prl_ekd.distill.initialisation import initialise
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.distill.teachers import Teacher, TeacherEnsemble
from s3prl_ekd.errors import CheckpointError, ConfigError, DataError, TeacherError
from s3prl_ekd.essence.units import load_units
from s3prl_ekd.student_file import LoadedStudent, write_student
from s3prl_ekd.teachers import check_source, load_upstream, teacher_model
from s3prl_ekd.teachers.checkpoint import identify
from s3prl_ekd.teachers.hf_names import fairseq_config, fairseq_model
from s3prl_ekd.teachers.random_weights import CONV_LAYERS

from .conftest import CONV, STUDENT

HF_SIZE = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [32] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.1,
}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
D2V = {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 7, "feat_extract_norm": "layer"}
MODELS = {
    "hubert": ("Hubert", {}),
    "hubert_large": ("Hubert", LARGE),
    "wavlm": ("WavLM", {}),
    "wavlm_large": ("WavLM", LARGE),
    "wav2vec2": ("Wav2Vec2", {}),
    "wav2vec2_large": ("Wav2Vec2", LARGE),
    "data2vec": ("Data2VecAudio", D2V),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Hugging Face folder with random weights for each of MODELS; the large ones normalise."""
    transformers = pytest.importorskip("transformers")
    folders = {}
    for name, (family, changes) in MODELS.items():
        folder = folders[name] = tmp_path_factory.mktemp("hf") / name
        config = getattr(transformers, f"{family}Config")(**{**HF_SIZE, **changes})
        torch.manual_seed(7)
        network = getattr(transformers, f"{family}Model")(config).eval()
        with torch.no_grad():  # no initial zeros and ones, so that every tensor counts
            for weight in network.parameters():
                weight += 0.05 * torch.randn(weight.shape)
        network.save_pretrained(folder)
        if changes:
            settings = {"do_normalize": True, "sampling_rate": 16000}
            (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folders


@torch.no_grad()
def hidden(upstream, waves):
    return upstream.eval()(list(waves))["hidden_states"]


def detected_kinds(caplog):
    """The checkpoint kinds that load_file has logged."""
    records = [r for r in caplog.records if r.name == "s3prl_ekd.teachers.checkpoint"]
    return [record.args[2] for record in records]


def as_s3prl(network, path):
    """Write the weights of a transformers model as a checkpoint in s3prl's format."""
    config, weights = network.config, fairseq_model(network, "here").state_dict()
    family = config.model_type
    normalize = config.feat_extract_norm == "layer"
    settings = fairseq_config(config)
    if family == "wavlm":
        state = {"cfg": {**settings, "normalize": normalize}, "model": weights}
    else:
        task = {"sample_rate": 16000, "normalize": normalize}
        state = {"task_cfg": task, "model_cfg": settings, "model_weight": weights}
        if family == "hubert":
            settings["label_rate"] = 50.0
            state["dictionaries_symbols"] = [None]
        else:
            for name in [name for name in weights if name.startswith(("final_proj", "label"))]:
                del weights[name]
        if family == "data2vec-audio":
            settings["average_top_k_layers"] = 2
            weights["_ema"] = {}
        elif family == "wav2vec2":
            from s3prl.upstream.wav2vec2.wav2vec2_model import Wav2Vec2Config, Wav2Vec2Model

            full = Wav2Vec2Model(Wav2Vec2Config(**settings)).state_dict()
            state["model_weight"] = {**full, **weights}
    torch.save(state, path)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_a_hugging_face_folder_gives_transformers_hidden_states(folders, waves, name):
    """On unpadded waveforms."""
    from transformers import AutoModel

    upstream = load_upstream(str(folders[name]), "here")
    network = AutoModel.from_pretrained(folders[name]).eval()
    for wave in waves:
        prepared = layer_norm(wave, wave.shape) if MODELS[name][1] else wave
        with torch.no_grad():
            out = network(prepared[None], output_hidden_states=True)
        # The last of hidden_states is before the final layer norm in transformers 5, after it in 4.
        expected = (*out.hidden_states[:-1], out.last_hidden_state)
        states = hidden(upstream, [wave])
        assert len(states) == len(expected) == 4
        for state, reference in zip(states, expected, strict=True):
            torch.testing.assert_close(state, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_hugging_face_folder_equals_s3prls_loader(folders, tmp_path, name, caplog):
    """On padded batches of various lengths, padding frames included."""
    upstream = load_upstream(str(folders[name]), "here")
    path = as_s3prl(upstream.network, tmp_path / "reference.pt")
    with caplog.at_level(logging.INFO):
        reference = load_upstream(str(path), "here")
    assert detected_kinds(caplog) == [name.removesuffix("_large")]
    assert upstream.get_downsample_rates("hidden_states") == 320
    generator = torch.Generator().manual_seed(5)
    for lengths in ((16000, 12345, 7000), (16079, 16000), (9000,), (8000, 8000), (12000, 720)):
        waves = [0.1 * torch.randn(n, generator=generator) for n in lengths]
        states, expected = hidden(upstream, waves), hidden(reference, waves)
        assert len(states) == len(expected) == 4
        for state, other in zip(states, expected, strict=True):
            torch.testing.assert_close(state, other, atol=1e-5, rtol=1e-5)


def test_normalisation_follows_the_preprocessor_then_the_config(folders, tmp_path, waves):
    assert not load_upstream(str(folders["hubert"]), "here").normalize
    copy = shutil.copytree(folders["hubert_large"], tmp_path / "copy")
    (copy / "preprocessor_config.json").write_text('{"do_normalize": false}')
    assert not load_upstream(str(copy), "here").normalize
    (copy / "preprocessor_config.json").unlink()
    assert load_upstream(str(copy), "here").normalize  # layer norm in the conv extractor
    (copy / "preprocessor_config.json").write_text('{"sampling_rate": 8000}')
    with pytest.raises(TeacherError, match=r"preprocessor_config\.json.*\b8000\b"):
        load_upstream(str(copy), "here")


@pytest.mark.parametrize("part", ["feature_extractor", "audio_processor"])
def test_a_processors_settings_take_precedence(folders, tmp_path, part):
    """In the layout of transformers 5."""
    # do_normalize is true in its preprocessor_config.json
    copy = shutil.copytree(folders["hubert_large"], tmp_path / "copy")
    processor = copy / "processor_config.json"
    processor.write_text(json.dumps({part: {"do_normalize": False, "sampling_rate": 16000}}))
    assert not load_upstream(str(copy), "here").normalize
    processor.write_text(json.dumps({"processor_class": "Wav2Vec2Processor"}))  # an older layout
    assert load_upstream(str(copy), "here").normalize
    processor.write_text(json.dumps({part: {"sampling_rate": 8000}}))
    with pytest.raises(TeacherError, match=r"/processor_config\.json.*\b8000\b"):
        check_source(str(copy), "here")
    processor.write_text(json.dumps({part: "none"}))
    with pytest.raises(TeacherError, match=rf"/processor_config\.json.*{part}.*'none'"):
        check_source(str(copy), "here")


def test_settings_saved_by_transformers_are_read(folders, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    copy = shutil.copytree(folders["hubert_large"], tmp_path / "copy")
    (copy / "preprocessor_config.json").unlink()
    (copy / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "a": 3}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(copy / "vocab.json")
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False)
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(copy)
    assert not (copy / "preprocessor_config.json").exists()
    assert not load_upstream(str(copy), "here").normalize


def test_padding_has_no_effect_through_a_batch_norm_before_the_positions(tmp_path, waves):
    """mHuBERT has one. The conv layers have layer norms, so padding has no effect through them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.HubertConfig(**{**HF_SIZE, **LARGE}, conv_pos_batch_norm=True)
    torch.manual_seed(7)
    network = transformers.HubertModel(config).eval()
    norm = network.encoder.pos_conv_embed.batch_norm
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean):
            value += torch.randn(value.shape)
    network.save_pretrained(tmp_path)
    upstream = load_upstream(str(tmp_path), "here")
    together = hidden(upstream, waves)
    for i, wave in enumerate(waves):
        for padded, alone in zip(together, hidden(upstream, [wave]), strict=True):
            torch.testing.assert_close(padded[i, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-5)
    running_mean = norm.running_mean.clone()
    ensemble = TeacherEnsemble({"m": Teacher(upstream, (1,), "m")}, dropout=True).train()
    ensemble(waves)
    assert torch.equal(upstream._batch_norm.running_mean, running_mean)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 378342945\n"
PAGE = "\n<!DOCTYPE html>\n<html class=''><head></head></html>"


@pytest.mark.parametrize(("text", "hint"), [(LFS, "git lfs pull"), (PAGE, "/resolve/")])
def test_git_lfs_pointers_and_web_pages_are_detected(folders, tmp_path, waves, text, hint):
    copy = shutil.copytree(folders["hubert"], tmp_path / "copy")
    for name in ("model.safetensors", "config.json"):
        (copy / name).write_text(text)
        with pytest.raises(TeacherError, match=f"{name}.*{hint}"):
            check_source(str(copy), "here")
    path = tmp_path / "teacher.pt"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=f"teacher.pt.*{hint}"):
        load_upstream(str(path), "here")
    with pytest.raises(CheckpointError, match=f"teacher.pt.*{hint}"):
        load_units(path)
    with pytest.raises(DataError, match=f"teacher.pt.*{hint}"):
        read_header(path)
    with pytest.raises(BadAudio, match=f"teacher.pt.*{hint}"):
        read_audio(path)


def test_a_hugging_face_teacher_in_training_mode_has_all_hidden_states(folders, waves):
    """With teacher_dropout, no layer is dropped and no frame masked."""
    teacher = Teacher(load_upstream(str(folders["wavlm"]), "here"), (0, 3), "w")
    ensemble = TeacherEnsemble({"w": teacher}, dropout=True).train()
    for _ in range(5):
        assert ensemble(waves)["w"].shape[:2] == (3, 2)


@pytest.mark.parametrize("name", ["hubert", "wavlm", "wav2vec2"])
def test_a_student_starts_from_a_hugging_face_teacher(folders, name):
    teacher = Teacher(load_upstream(str(folders[name]), "here"), (1,), name)
    student = Student(StudentSettings(**STUDENT))
    source = teacher_model(TeacherEnsemble({name: teacher}), name)
    initialise(student, [source], conv=True, encoder=True)
    network = teacher.upstream.network
    expected = network.encoder.layers[1].feed_forward.output_dense.weight
    assert torch.equal(student.backbone.encoder.layers[1].fc2.weight, expected)
    expected = network.feature_projection.projection.weight
    assert torch.equal(student.backbone.post_extract_proj.weight, expected)


def test_a_teacher_with_an_unknown_layer_cannot_initialise_a_student(folders):
    upstream = load_upstream(str(folders["hubert"]), "here")
    upstream.network.encoder.extra = torch.nn.Linear(1, 1)
    ensemble = TeacherEnsemble({"h": Teacher(upstream, (1,), "h")})
    with pytest.raises(ConfigError, match=r"init\.teacher: h\b.*encoder\.extra"):
        teacher_model(ensemble, "h")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda f: (f / "config.json").unlink(), ["config.json", "model.safetensors"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
        (lambda f: (f / "config.json").write_text("[]"), ["config.json", "JSON"]),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
            ["config.json", "'bert'", "hubert, wavlm, wav2vec2, data2vec-audio"],
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "tf_model.h5"),
            ["model.safetensors", "pytorch_model.bin"],
        ),
    ],
)
def test_a_folder_of_another_kind_is_rejected_early(folders, tmp_path, change, parts):
    copy = shutil.copytree(folders["hubert"], tmp_path / "copy")
    change(copy)
    with pytest.raises(TeacherError) as error:
        check_source(str(copy), "teachers.h.model")
    for part in ("teachers.h.model", str(copy), *parts):
        assert part in str(error.value)


def test_damaged_or_missing_weights_are_rejected(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folders["hubert"], tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["encoder.layers.1.final_layer_norm.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"\b1\b.*encoder\.layers\.1\.final_layer"):
        load_upstream(str(copy), "here")
    with pytest.raises(TeacherError, match=r"model\.safetensors.*config\.json"):
        load_upstream(str(copy / "model.safetensors"), "here")
    (copy / "model.safetensors").write_bytes(b"none")
    header = int.from_bytes(b"none", "little")  # bytes, according to the first 8 bytes
    with pytest.raises(CheckpointError, match=f"{header:,}"):
        load_upstream(str(copy), "here")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_upstream(str(copy / "model.safetensors"), "here")


def test_code_in_a_folder_is_not_run(folders, tmp_path):
    copy = shutil.copytree(folders["hubert"], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load_upstream(str(copy), "here")
    assert not (tmp_path / "ran").exists()


# DistilHuBERT


def distilhubert(**changes):
    from s3prl.upstream.distiller.model import DistillerConfig, DistillerModel

    config = {**STUDENT, "n_tasks": 3, "pred_layer_id": [4, 8, 12], "final_dim": 48, **changes}
    model = DistillerModel(DistillerConfig({**config, "extractor_conv_feature_layers": CONV}))
    return {"Distiller": model.state_dict(), "Config": {"distiller": config, "teacher": {}}}


def test_distilhubert_gives_s3prls_layers_without_the_predictions(tmp_path, waves):
    from s3prl.upstream.distiller.expert import UpstreamExpert

    torch.save(distilhubert(), tmp_path / "distil.ckpt")
    upstream = load_upstream(str(tmp_path / "distil.ckpt"), "here")
    reference = UpstreamExpert(str(tmp_path / "distil.ckpt"))
    states, expected = hidden(upstream, waves), hidden(reference, waves)
    assert len(states) == 3 and len(expected) == 6
    for state, other in zip(states, expected[:3], strict=True):
        torch.testing.assert_close(state, other, atol=1e-6, rtol=1e-6)
    assert upstream.get_downsample_rates("hidden_states") == 320
    ensemble = TeacherEnsemble({"d": Teacher(upstream, (1, 2), "d")})
    initialise(
        Student(StudentSettings(**STUDENT)), [teacher_model(ensemble, "d")], conv=True, encoder=True
    )


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            {"extractor_conv_feature_layers": "__import__('os').mkdir('hacked')"},
            ["extractor_conv_feature_layers"],
        ),
        ({"task_emb_type": "add"}, ["task_emb_type", "'add'", "expand-last"]),
        ({"attention_type": "sparse"}, ["attention_type", "'sparse'", "original"]),
        ({"encoder_layers": 1}, ["state_dict"]),  # torch's message
        ({"conv_pos": "many"}, ["conv_pos"]),
    ],
)
def test_an_unsupported_distilhubert_is_rejected(tmp_path, monkeypatch, change, parts):
    monkeypatch.chdir(tmp_path)
    state = distilhubert()
    state["Config"]["distiller"].update(change)
    torch.save(state, tmp_path / "distil.ckpt")
    with pytest.raises(CheckpointError) as error:
        load_upstream("distil.ckpt", "here")
    for part in ("distil.ckpt", *parts):
        assert part in str(error.value)
    assert not (tmp_path / "hacked").exists()


# Other checkpoint files


@pytest.mark.parametrize("name", ["student.safetensors", "student.pt"])
def test_an_ekd_student_is_a_teacher(tmp_path, waves, student_settings, name):
    student = Student(student_settings)
    write_student(LoadedStudent(student, None, {}, {"step": 1}), tmp_path / name)
    teacher = Teacher(load_upstream(str(tmp_path / name), "here"), (0, 2), "s")
    ensemble = TeacherEnsemble({"s": teacher})
    assert ensemble(waves)["s"].shape[1] == 2
    initialise(Student(student_settings), [teacher_model(ensemble, "s")], conv=True, encoder=True)


def test_unispeech_sat_is_distinguished_from_wavlm(teachers, tmp_path, waves, caplog):
    state = torch.load(teachers["wavlm"], weights_only=True)
    assert identify(state, "x")[0] == "wavlm"
    state["cfg"].update(relative_position_embedding=False, gru_rel_pos=False)
    for name in [n for n in state["model"] if "grep" in n or "relative" in n]:
        del state["model"][name]
    torch.save(state, tmp_path / "sat.pt")
    with caplog.at_level(logging.INFO):
        upstream = load_upstream(str(tmp_path / "sat.pt"), "here")
    assert detected_kinds(caplog) == ["unispeech_sat"]
    assert len(hidden(upstream, waves)) == 5


class Dictionary:
    """A replacement for the class of fairseq that its checkpoints pickle."""


Dictionary.__module__, Dictionary.__qualname__ = "fairseq.data.dictionary", "Dictionary"


@pytest.mark.parametrize(
    ("state", "family"),
    [
        ({"cfg": {"model": {"_name": "hubert"}}, "model": {}}, "hubert"),
        ({"cfg": {"model": {"_name": "wav2vec_ctc"}}, "model": {}}, "wav2vec2"),
        ({"cfg": {"model": {"_name": "data2vec_audio"}}, "model": {}}, "data2vec"),
        ({"args": {}, "model": {}}, "hubert"),
        ("pickled", "hubert"),
    ],
)
def test_a_fairseq_checkpoint_gives_the_command_to_convert_it(tmp_path, monkeypatch, state, family):
    if state == "pickled":  # fairseq's HuBERT checkpoints contain objects of its classes
        import sys
        import types

        module = types.ModuleType("fairseq.data.dictionary")
        module.Dictionary = Dictionary
        for name in ("fairseq", "fairseq.data"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "fairseq.data.dictionary", module)
        state = {"cfg": {}, "model": {}, "task_state": {"dictionaries": [Dictionary()]}}
    torch.save(state, tmp_path / "fair.pt")
    command = re.escape(f"python -m s3prl.upstream.{family}.convert {tmp_path / 'fair.pt'}")
    with pytest.raises(TeacherError, match=command):
        load_upstream(str(tmp_path / "fair.pt"), "here")


@pytest.mark.parametrize("family", ["wav2vec2", "data2vec"])
def test_conv_layers_are_checked_before_s3prl_evaluates_them(tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    config = {"conv_feature_layers": "__import__('os').mkdir('hacked')", "_name": family}
    torch.save({"task_cfg": {"a": 1}, "model_cfg": config, "model_weight": {}}, "evil.pt")
    with pytest.raises(ConfigError, match=r"conv_feature_layers.*evil\.pt"):
        load_upstream("evil.pt", "here")
    config["conv_feature_layers"] = CONV_LAYERS
    torch.save({"task_cfg": {"a": 1}, "model_cfg": config, "model_weight": {}}, "empty.pt")
    assert not (tmp_path / "hacked").exists()
    with pytest.raises(CheckpointError, match=rf"empty\.pt.*\b{family}\b"):
        load_upstream("empty.pt", "here")


def test_layers_and_groups_of_a_config_reach_the_teacher(teachers):
    from s3prl_ekd.distill.settings import TeacherSettings
    from s3prl_ekd.teachers import load_teachers

    settings = {
        "layers": TeacherSettings(str(teachers["hubert"]), (2, 4)),
        "groups": TeacherSettings(str(teachers["wavlm"]), groups=((1, 2), (3,))),
    }
    loaded = load_teachers(settings, dropout=False)
    assert loaded["layers"].targets == ((2,), (4,))
    assert loaded["groups"].targets == ((1, 2), (3,))
