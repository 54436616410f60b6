"""Units of several teachers: a head for each file, on masked and unmasked frames."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from s3prl_ekd.distill.settings import LossSettings, UnitLossSettings
from s3prl_ekd.distill.unit_loss import unit_names
from s3prl_ekd.errors import ConfigError
from s3prl_ekd.essence.units import save_units
from s3prl_ekd.pretrain.distributed import distiller_batch
from s3prl_ekd.pretrain.settings import load_model_config

from .cache_cases import adapter, configs
from .conftest import NO_DROPOUT, edit_yaml, saved_states
from .fake_teachers import (
    MASK,
    FakeUpstream,
    batch_of,
    fake_distiller,
    noise,
    random_units,
    spans_of,
    student_frames,
)

LENGTHS = (16000, 9000, 5000)
UNITS = (("a", 3, 5, 1), ("b", 4, 7, 2), ("a", 3, 4, 3))  # teacher, layer, clusters, seed


def nearest(centroids, frame):
    """The index of the nearest centroid."""
    distances = [float((frame - centroid).square().sum()) for centroid in centroids]
    return distances.index(min(distances))


def by_hand(distiller, upstreams, units, waves, spans):
    """Cross-entropy and accuracy of each file of units, ``(masked, unmasked)``, in loops."""
    batch = batch_of(waves, spans)
    masked = None
    if spans is not None:
        masked = batch.spans, distiller.trainable["mask_embedding"].vector
    with torch.no_grad():
        last = distiller.student(batch.waves, batch.lengths, masked).last
    results = []
    for labels, head in zip(units, distiller.trainable["unit_heads"].values(), strict=True):
        sums = {True: [], False: []}
        for i, wave in enumerate(waves):
            states = upstreams[labels.teacher]([wave])["hidden_states"][labels.layer][0]
            for t in range(student_frames(len(wave))):
                logits = head.weight.detach() @ last[i, t] + head.bias.detach()
                label = nearest(labels.centroids, states[t])
                loss = -float(logits[label] - logits.exp().sum().log())
                hit = float(logits.tolist().index(max(logits.tolist())) == label)
                sums[spans is not None and bool(spans[i][t])].append((loss, hit))
        results.append(
            {
                inside: [sum(values) / len(pairs) for values in zip(*pairs, strict=True)]
                for inside, pairs in sums.items()
                if pairs
            }
        )
    return results


@pytest.mark.parametrize("reduce", ["frames", "batches"])
@pytest.mark.parametrize("mask", [MASK, None])
def test_each_file_has_a_head_and_a_term(mask, reduce):
    upstreams = {"a": FakeUpstream(), "b": FakeUpstream(seed=1)}
    units = [random_units(*values) for values in UNITS]
    weights = [(1.0, 0.5), (2.0, 0.0), (0.0, 0.25)] if mask else [(1.0,), (2.0,), (0.0,)]
    loss_settings = LossSettings(weight=0.0, reduce=reduce)
    distiller = fake_distiller(upstreams, units, weights, mask, loss=loss_settings)
    waves, spans = noise(*LENGTHS), spans_of(LENGTHS) if mask else None
    loss, logs = distiller(batch_of(waves, spans))
    heads = distiller.trainable["unit_heads"]
    assert {name: head.out_features for name, head in heads.items()} == {
        "a_layer3": 5,
        "b_layer4": 7,
        "a_layer3_2": 4,
    }
    # the heads for hidden states are not trained, so their distances are not logged
    assert not any(name.startswith(("l1", "cosine", "a/", "b/")) for name in logs)
    expected = 0.0
    results = by_hand(distiller, upstreams, units, waves, spans)
    for name, (weight, *unmasked), result in zip(heads, weights, results, strict=True):
        main, accuracy = result[mask is not None]
        expected += weight * main
        assert logs[f"{name}/unit_loss"].item() == pytest.approx(main, rel=1e-5)
        assert logs[f"{name}/unit_accuracy"].item() == pytest.approx(accuracy, abs=1e-6)
        if unmasked and unmasked[0]:
            other, accuracy = result[False]
            expected += unmasked[0] * other
            assert logs[f"{name}/unit_loss_unmasked"].item() == pytest.approx(other, rel=1e-5)
            value = logs[f"{name}/unit_accuracy_unmasked"].item()
            assert value == pytest.approx(accuracy, abs=1e-6)
        else:
            assert f"{name}/unit_loss_unmasked" not in logs
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    silent = [name for name, head in heads.items() if not head.weight.grad.any()]
    assert silent == ([] if mask else ["a_layer3_2"])


def test_one_file_is_logged_without_a_name():
    distiller = fake_distiller({"a": FakeUpstream()}, [random_units("a", 3)])
    _, logs = distiller(batch_of(noise(*LENGTHS)))
    assert {"unit_loss", "unit_accuracy"} == {name for name in logs if "unit" in name}


def test_names_are_distinct():
    teachers = [("a", 1), ("a", 1), ("a", 11), ("b", 1), ("a", 1), ("a_layer1", 2), ("a", 1)]
    names = unit_names([random_units(*values) for values in teachers])
    assert names[:5] == ["a_layer1", "a_layer1_2", "a_layer11", "b_layer1", "a_layer1_3"]
    assert len({*names}) == len(names)


def test_units_change_neither_teachers_nor_other_terms():
    """The distillation loss with units is that without, apart from the units' terms."""
    upstreams = {"a": FakeUpstream(), "b": FakeUpstream(seed=1)}
    units = [random_units(*values) for values in UNITS]
    batch = batch_of(noise(*LENGTHS))
    plain = fake_distiller(upstreams)
    ours = fake_distiller(upstreams, units, [(1.0,), (0.5,), (0.0,)])
    ours.student.load_state_dict(plain.student.state_dict())
    ours.heads.load_state_dict(plain.heads.state_dict())
    loss, logs = ours(batch)
    expected = plain(batch)[0] + logs["a_layer3/unit_loss"] + 0.5 * logs["b_layer4/unit_loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


# Configs


def model(student=None, **changes):
    config = {
        "teachers": {"a": {"model": "a.pt", "layers": [2]}},
        "student": {**NO_DROPOUT, **(student or {})},
        "unit_loss": [{"file": "one"}, {"file": "two"}],
    }
    return {key: value for key, value in {**config, **changes}.items() if value is not None}


def loaded(tmp_path, config):
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(config))
    return load_model_config(path)


MASKED = {"mask": {"length": 5, "share": 0.5}}


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (
            model(unit_loss=[{"file": "x"}, {"file": "y", "unmasked_weight": 0.5}]),
            ["unit_loss[1].unmasked_weight", "student.mask"],
        ),
        (model(MASKED, unit_loss=None), ["student.mask", "unit_loss"]),
        (model(MASKED, unit_loss=[]), ["student.mask", "unit_loss"]),
        (
            model(MASKED, student_backend="s3prl"),
            ["student.mask", "student_backend: ours"],
        ),
        (model(unit_loss=[{"file": "x", "weight": -1}]), ["unit_loss[0]", "weight", "-1"]),
        (model(unit_loss=[{"weight": 1}]), ["unit_loss[0]", "file"]),
        (model({"mask": {"share": 2}}), ["student.mask", "share", "2"]),
        (model({"mask": {"width": 2}}), ["student.mask", "width"]),
    ],
)
def test_settings_that_do_not_fit(tmp_path, config, parts):
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, config)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path) in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("student", "backend"), [({"kind": "copy", "of": "a"}, "ours"), (NO_DROPOUT, "ours")]
)
def test_a_mask_with_units_is_accepted(tmp_path, student, backend):
    settings = loaded(
        tmp_path,
        model(student={}, unit_loss=[{"file": "x", "unmasked_weight": 0.5}])
        | {"student": {**student, **MASKED}, "student_backend": backend},
    )
    assert settings.student.mask == MASK
    assert settings.unit_loss == (UnitLossSettings("x", 1.0, 0.5),)


@pytest.mark.parametrize(
    ("unit_loss", "expected"),
    [
        ({"file": "x", "weight": 2}, (UnitLossSettings("x", 2.0),)),
        ({"file": "x"}, (UnitLossSettings("x"),)),
        ({"file": None, "weight": 1.0}, ()),
    ],
)
def test_a_mapping_of_version_0_1_is_a_list_of_one(tmp_path, unit_loss, expected):
    """In a file, and in a checkpoint."""
    config = model(unit_loss=unit_loss)
    assert loaded(tmp_path, config).unit_loss == expected
    assert load_model_config(config).unit_loss == expected


# Runs


@pytest.fixture
def folder(pretrain_folder, teachers, corpus):
    """Configs with units of two teachers; layer 3 is no target."""
    unit_loss = [{"file": "one.safetensors"}, {"file": "two.safetensors", "weight": 0.5}]
    configs(pretrain_folder, teachers, corpus, unit_loss=unit_loss)
    save_units(random_units("hubert", 3), pretrain_folder / "one.safetensors")
    save_units(random_units("wavlm", 4, clusters=6), pretrain_folder / "two.safetensors")
    return pretrain_folder


def test_a_run_with_units_of_two_teachers_is_resumed(folder, pretrain_with):
    """Heads and mask embedding are in the checkpoint: 6 steps equal 3 and 3 more."""
    with edit_yaml(folder / "model.yaml") as config:
        config["student"] = {**NO_DROPOUT, **MASKED}
        config["unit_loss"][0]["unmasked_weight"] = 0.5
    assert pretrain_with("whole", num_workers=0)[0] == 0
    whole, first = saved_states("whole"), saved_states("whole", "states-3.ckpt")
    run = folder / "result/pretrain/whole"
    (run / "states-6.ckpt").unlink()
    assert pretrain_with("whole", "-a")[0] == 0
    resumed = saved_states("whole")
    assert resumed["Step"] == whole["Step"] == 6
    for part in ("UnitHead", "MaskEmbedding"):
        assert whole[part].keys() == resumed[part].keys() == first[part].keys()
        for name, value in whole[part].items():
            assert torch.equal(resumed[part][name], value), name
            assert not torch.equal(first[part][name], value), name
    assert {name: len(value) for name, value in whole["UnitHead"].items()} == {
        "hubert_layer3.weight": 5,
        "hubert_layer3.bias": 5,
        "wavlm_layer4.weight": 6,
        "wavlm_layer4.bias": 6,
    }


def test_units_of_another_model_are_refused(folder, pretrain_with):
    units = random_units("hubert", 3)
    units.model = "other.pt"
    save_units(units, folder / "one.safetensors")
    code, output = pretrain_with("x", num_workers=0)
    assert code == 2 and re.search(r"unit_loss\[0\].*other\.pt.*teachers\.hubert", output)
    with edit_yaml(folder / "model.yaml") as config:
        units.model = "/elsewhere/" + Path(config["teachers"]["hubert"]["model"]).name
    save_units(units, folder / "one.safetensors")
    adapter(folder)


def test_units_and_teachers_that_have_changed_since_the_checkpoint(folder, pretrain_with):
    with edit_yaml(folder / "model.yaml") as config:
        shutil.copy(config["teachers"]["wavlm"]["model"], folder / "teacher.pt")
        config["teachers"]["wavlm"]["model"] = "teacher.pt"
    assert pretrain_with("x", num_workers=0)[0] == 0
    units = (folder / "two.safetensors").read_bytes()
    save_units(random_units("wavlm", 4, clusters=6, seed=9), folder / "two.safetensors")
    code, output = pretrain_with("x", "-a")
    assert code == 2 and re.search(r"changed.*: unit_loss\[1\]\.file;", output)
    (folder / "two.safetensors").write_bytes(units)
    states = torch.load(folder / "teacher.pt", weights_only=False)
    torch.save({**states, "more": 1}, folder / "teacher.pt")
    code, output = pretrain_with("x", "-a")
    assert code == 2 and re.search(r"changed.*: teachers\.wavlm\.model;", output)


def test_a_missing_units_file_is_noticed_before_the_teachers_load(folder, pretrain_with):
    (folder / "two.safetensors").unlink()
    code, output = pretrain_with("x", num_workers=0)
    assert code == 2 and "two.safetensors" in output and "teacher hubert" not in output


def test_a_checkpoint_of_version_0_1_with_a_unit_head(folder, pretrain_with, pretrain):
    """It had one head, without a name, and a mapping in the config."""
    with edit_yaml(folder / "model.yaml") as config:
        del config["unit_loss"][1]
    assert pretrain_with("new", num_workers=0)[0] == 0
    expected = saved_states("new")
    run = folder / "result/pretrain"
    saved = saved_states("new", "states-3.ckpt")
    (old,) = saved["Upstream_Config"]["unit_loss"]
    saved["Upstream_Config"]["unit_loss"] = {key: old[key] for key in ("file", "weight")}
    saved["UnitHead"] = {
        name.removeprefix("hubert_layer3."): value for name, value in saved["UnitHead"].items()
    }
    assert saved["UnitHead"].keys() == {"weight", "bias"}
    (run / "old").mkdir()
    torch.save(saved, run / "old/states-3.ckpt")
    assert pretrain("-e", "result/pretrain/old/states-3.ckpt")[0] == 0
    resumed = saved_states("old")["UnitHead"]
    assert resumed.keys() == expected["UnitHead"].keys()
    for name, value in expected["UnitHead"].items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6)


def test_cached_units_of_a_target_layer_equal_those_of_running_teachers(folder, cached_targets):
    """A layer that is no target is not in the cache: an error that names its place in the list."""
    with edit_yaml(folder / "model.yaml") as config:
        config["student"] = {**NO_DROPOUT, **MASKED}
        config["teacher_backend"] = "s3prl"
    data = {"train_batch_size": 1, "target_cache": str(cached_targets / "float16")}
    with pytest.raises(ConfigError, match=r"unit_loss\[0\].*\b3\b.*\bhubert\b"):
        adapter(folder, **data)
    save_units(random_units("hubert", 2), folder / "one.safetensors")
    losses = []
    for changes in (data, {"train_batch_size": 1}):
        expert = adapter(folder, **changes)
        dataset = expert.dataloader.dataset
        records = {}
        for i in range(3):
            batch = dataset[i]
            _, logs = expert.distiller(distiller_batch(batch, "cpu"), counts=expert.count(batch))
            records |= {f"{i}/{k}": v.item() for k, v in logs.items() if "unit_loss" in k}
        losses.append(records)
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], abs=0.05)


def test_units_under_bfloat16_autocast():
    """The student runs in bfloat16; labels and cross-entropy stay in float32."""
    ours = fake_distiller({"a": FakeUpstream()}, [random_units("a", 3)]).eval()
    batch = batch_of(noise(*LENGTHS))
    plain = ours(batch)[1]["unit_loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss, logs = ours(batch)
    assert logs["unit_loss"].dtype == loss.dtype == torch.float32
    assert logs["unit_loss"].item() == pytest.approx(plain.item(), rel=0.02)
