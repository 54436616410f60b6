"""`s3prl-ekd doctor --teachers`, on checkpoints of the published formats."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from s3prl_ekd.cli import main
from s3prl_ekd.teachers import load_upstream, published
from s3prl_ekd.teachers.fast.encoder import FastEncoder
from s3prl_ekd.teachers.stored import write_states

from .conftest import SIZES, error_of, make_sound
from .corpora import write_audio
from .hub_server import commit, connected, serve


@pytest.fixture
def check(tmp_path, teachers, monkeypatch, capsys):
    """Check teachers of a config; returns exit code, output and the report by teacher."""
    monkeypatch.chdir(tmp_path)

    def run(models, *argv):
        settings = {name: {"model": str(model), "layers": [1, 2]} for name, model in models.items()}
        Path("model.yaml").write_text(yaml.safe_dump({"teachers": settings}))
        capsys.readouterr()
        code = main(["doctor", "--teachers", "model.yaml", *argv])
        report = json.loads(Path("teachers.json").read_text(), parse_constant=pytest.fail)
        return code, capsys.readouterr().out, {row["name"]: row for row in report["teachers"]}

    return run


def test_counts_and_differences(check, teachers, tmp_path):
    write_audio(tmp_path / "a.flac", make_sound(1.0))
    code, output, rows = check(
        {"h": teachers["hubert"], "w": teachers["wavlm"], "tiny": "tiny_hubert"},
        "--audio",
        "a.flac",
    )
    assert code == 0, output
    for name, model in (("h", teachers["hubert"]), ("w", teachers["wavlm"])):
        upstream = load_upstream(str(model), "here")
        count = sum(parameter.numel() for parameter in upstream.parameters())
        assert rows[name]["parameters"] == count and f"{count:,}" in output
        assert rows[name]["published"] is None
        assert rows[name]["layers"] == SIZES["layers"] + 1
        assert rows[name]["widths"] == [SIZES["embed_dim"]]
        assert set(rows[name]["differences"]) == {"one utterance", "a padded batch"}
        for values in rows[name]["differences"].values():
            assert len(values) == SIZES["layers"] + 1 and 0 <= max(values) < 1e-4
        assert rows[name]["largest_difference"] == max(
            max(values) for values in rows[name]["differences"].values()
        )
        assert rows[name]["verdict"] == "ok"


def test_a_published_count_is_compared(check, teachers, tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    network(folder)
    with serve() as hub, connected(hub.address, tmp_path / "cache"):
        hub.repos["microsoft/wavlm-base-plus"] = {commit(1): folder}
        code, output, rows = check({"w": "microsoft/wavlm-base-plus"})
        assert code == 1 and "94,381,936" in output
        assert rows["w"]["published"] == 94_381_936
        assert rows["w"]["model"] == f"microsoft/wavlm-base-plus@{commit(1)}"
        assert rows["w"]["largest_difference"] < 1e-5
        count = rows["w"]["parameters"]
        monkeypatch.setitem(published.PARAMETERS, "microsoft/wavlm-base-plus", count)
        code, output, rows = check({"w": "microsoft/wavlm-base-plus"})
        assert code == 0 and rows["w"]["verdict"] == "ok"


def network(folder):
    from transformers import WavLMConfig, WavLMModel

    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=[32] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    WavLMModel(config).save_pretrained(folder)


@pytest.mark.parametrize("change", [lambda x: 1.01 * x, lambda x: x * float("nan")])
def test_a_wrong_fast_path_is_found(check, teachers, monkeypatch, change):
    original = FastEncoder.hidden_states

    def wrong(self, waves, lengths, layers, shared=None):
        states = original(self, waves, lengths, layers, shared)
        return {n: change(state) if n == 2 else state for n, state in states.items()}

    monkeypatch.setattr(FastEncoder, "hidden_states", wrong)
    code, output, rows = check({"h": teachers["hubert"]})
    assert code == 1 and "teacher_backend: s3prl" in output
    # not a number is null in JSON
    differs = [value is None or value > 1e-3 for value in rows["h"]["differences"]["one utterance"]]
    assert differs == [False, False, True, False, False]


def test_a_teacher_that_cannot_be_loaded_does_not_stop_the_others(check, teachers, tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    code, output, rows = check({"bad": tmp_path / "bad.pt", "h": teachers["hubert"]})
    assert code == 1 and "bad.pt" in rows["bad"]["verdict"]
    assert rows["h"]["verdict"] == "ok" and "Traceback" not in output


def test_a_folder_of_stored_states_has_nothing_to_compare(check, tmp_path):
    wave = torch.from_numpy(make_sound(1.0)).float()
    frames = (len(wave) - 400) // 320 + 1
    write_states(tmp_path / "stored", wave, torch.randn(3, frames, 16))
    code, output, rows = check({"s": tmp_path / "stored"})
    assert code == 0 and rows["s"]["verdict"] == "ok" and rows["s"]["differences"] is None
    assert (rows["s"]["layers"], rows["s"]["widths"]) == (3, [16])


def test_mistakes(check, teachers, capsys, tmp_path):
    check({"h": teachers["hubert"]})
    write_audio(tmp_path / "short.flac", make_sound(0.2))
    for argv, part in (
        (("--teachers", "nothing.yaml"), "nothing.yaml"),
        (("--teachers", "model.yaml", "--throughput"), "--throughput"),
        (("--teachers", "model.yaml", "--audio", "none.flac"), "none.flac"),
        (("--teachers", "model.yaml", "-o", "."), "folder"),
        (("--teachers", "model.yaml", "--audio", "short.flac"), "--audio short.flac"),
        (("--audio", "a.flac"), "--teachers"),
        (("-o", "a.json"), "--teachers"),
    ):
        assert part in error_of(capsys, "doctor", *argv)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), [("hubert_base", "hubert"), ("wavlm_base", "wavlm")])
def test_published_counts_are_those_of_s3prls_models(name, family):
    from s3prl_ekd.teachers.random_weights import hubert_checkpoint, wavlm_checkpoint

    base = {
        "conv_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
        "embed_dim": 768,
        "ffn_dim": 3072,
        "heads": 12,
        "layers": 12,
        "conv_pos": 128,
        "conv_pos_groups": 16,
    }
    if family == "hubert":
        weights = hubert_checkpoint(classes=504, **base)["model_weight"]
    else:
        weights = wavlm_checkpoint(**base)["model"]
    assert published.PARAMETERS[name] == sum(weight.numel() for weight in weights.values())
