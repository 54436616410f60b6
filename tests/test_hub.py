"""Models of the Hugging Face Hub, from a stand-in of it, and weights in several files."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import HubertConfig, HubertForCTC

from s3prl_ekd.errors import CheckpointError, TeacherError
from s3prl_ekd.files.hub import HubId, fetch, parse_hub_id, pin, same_model
from s3prl_ekd.teachers import check_source, load_upstream

from .conftest import command, edit_yaml, saved_states
from .hub_server import commit, connected, serve

CONFIG = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [32] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 12,
}
UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def network():
    """A fine-tuned HuBERT: its weights have a prefix and a head, as many published ones."""
    torch.manual_seed(4)
    return HubertForCTC(HubertConfig(**CONFIG)).eval()


@pytest.fixture(scope="module")
def folders(network, tmp_path_factory):
    """The same model with weights in each of the published ways."""
    root = tmp_path_factory.mktemp("hub")
    folders = {}
    for kind, size in (("one", "1GB"), ("shards", "100KB")):
        folder = folders[f"safetensors, {kind}"] = root / kind
        network.save_pretrained(folder, max_shard_size=size)
        (folder / "preprocessor_config.json").write_text('{"do_normalize": true}')
        folders[f"bin, {kind}"] = torch_weights(folder, root / f"{kind}_bin")
    return folders


def torch_weights(source, folder):
    """A copy of a folder with its safetensors files as pytorch_model*.bin, in which the norms of
    weights have the names of before torch 2.0."""
    folder.mkdir()
    for path in sorted(source.iterdir()):
        name = path.name.replace("model", "pytorch_model").replace("safetensors", "bin")
        if path.suffix == ".safetensors":
            torch.save(renamed(load_file(path)), folder / name)
        elif "index" in path.name:
            index = json.loads(path.read_text())
            shards = renamed(index["weight_map"]).items()
            index["weight_map"] = {
                key: shard.replace("model", "pytorch_model").replace("safetensors", "bin")
                for key, shard in shards
            }
            (folder / name).write_text(json.dumps(index))
        else:
            shutil.copy(path, folder)
    return folder


def renamed(weights):
    new = {"parametrizations.weight.original0": "weight_g"}
    new["parametrizations.weight.original1"] = "weight_v"
    pattern = re.compile("|".join(map(re.escape, new)))
    return {pattern.sub(lambda m: new[m[0]], name): value for name, value in weights.items()}


@pytest.fixture
def hub(folders):
    """A Hub with ``org/model`` in two versions: bin alone (tag v1), then also safetensors."""
    with serve() as hub:
        hub.repos["org/model"] = {commit(1): folders["bin, shards"]}
        hub.tags["org/model", "v1"] = commit(1)
        yield hub


@pytest.mark.parametrize(
    "kind", ["safetensors, one", "safetensors, shards", "bin, one", "bin, shards"]
)
def test_every_format_of_the_weights_gives_the_same_hidden_states(folders, network, waves, kind):
    folder = folders[kind]
    assert len([*folder.glob("*model-*")]) == 3 * ("shards" in kind)
    check_source(str(folder), "here")
    upstream = load_upstream(str(folder), "here")
    assert upstream.normalize
    wave = waves[0]
    with torch.no_grad():
        states = upstream([wave])["hidden_states"]
        normal = torch.nn.functional.layer_norm(wave, wave.shape)
        expected = network.hubert(normal[None], output_hidden_states=True).hidden_states
    assert len(states) == len(expected) == 3
    for state, other in zip(states, expected, strict=True):
        assert torch.allclose(state, other, atol=1e-5)


@pytest.mark.parametrize("kind", ["safetensors, shards", "bin, shards"])
@pytest.mark.parametrize("shard", ["../model.bin", "/etc/passwd", "a\\b.bin", 3, "x.pt", ".bin"])
def test_an_index_names_only_files_of_its_folder(folders, tmp_path, kind, shard):
    folder = shutil.copytree(folders[kind], tmp_path / "copy")
    (index,) = folder.glob("*.index.json")
    data = json.loads(index.read_text())
    data["weight_map"][next(iter(data["weight_map"]))] = shard
    index.write_text(json.dumps(data))
    shutil.copy(next(folder.glob("*-00001-*")), tmp_path / "model.bin")
    with pytest.raises(TeacherError, match=index.name):
        check_source(str(folder), "here")
    with serve() as hub:
        hub.repos["org/model"] = {commit(1): folder}
        expected = pytest.raises(TeacherError, match=f"^here: .*{index.name}")
        with connected(hub.address, tmp_path / "cache"), expected:
            fetch(HubId("org/model"), "here", TeacherError)
        assert not [name for name in hub.downloads() if name.endswith((".bin", ".safetensors"))]


@pytest.mark.parametrize("kind", ["safetensors, shards", "bin, shards"])
def test_a_missing_shard_is_named(folders, tmp_path, kind):
    folder = shutil.copytree(folders[kind], tmp_path / "copy")
    shard = sorted(folder.glob("*-00002-*"))[0]
    shard.unlink()
    with pytest.raises(TeacherError, match=shard.name):
        check_source(str(folder), "here")


class Evil:
    def __reduce__(self):
        return print, ("code runs",)


@pytest.mark.parametrize("value", [Evil(), [1, 2], {"a": torch.zeros(1)}])
def test_torch_weights_hold_tensors_only(folders, tmp_path, value, capsys):
    folder = shutil.copytree(folders["bin, one"], tmp_path / "copy")
    path = folder / "pytorch_model.bin"
    torch.save({**torch.load(path), "more": value}, path)
    with pytest.raises(CheckpointError, match=r"here.*pytorch_model\.bin"):
        load_upstream(str(folder), "here")
    assert "code runs" not in capsys.readouterr().out


def test_settings_of_a_huge_model_do_not_fill_the_memory(folders, tmp_path):
    folder = shutil.copytree(folders["bin, one"], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 10**9}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*larger|config\.json"):
        load_upstream(str(folder), "here")


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("microsoft/wavlm-base-plus", "microsoft/wavlm-base-plus", None),
        ("org/a.b_c-d", "org/a.b_c-d", None),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
        ("org/name.pt@main", "org/name.pt", "main"),
    ],
)
def test_ids(text, repo, revision):
    assert parse_hub_id(text) == HubId(repo, revision)


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "a/b/c",
        "./a/b",
        "/a/b",
        "~/b",
        "../b",
        "a/..",
        "a/b@",
        "a/b@x@y",
        "a/b@../c",
        "a/--b",
        "a/b.git",
        "a/b c",
        "a/b\n",
        "folder/student.pt",
        "folder/student.safetensors",
        "a\\b",
        "ä/b",
        "a/" + "b" * 120,
    ],
)
def test_other_texts_are_no_ids(text):
    assert parse_hub_id(text) is None
    with pytest.raises(TeacherError, match="here: no such"):
        check_source(text, "here")


def test_a_local_folder_wins_over_an_id(folders, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders["safetensors, one"], tmp_path / "org/model")
    assert parse_hub_id("org/model") is None
    with connected(hub.address, tmp_path / "cache"):
        load_upstream("org/model", "here")
        assert hub.requests == []
        load_upstream("org/model@v1", "here")
    assert hub.requests


def test_only_one_format_is_downloaded_once(folders, hub, tmp_path):
    folder = shutil.copytree(folders["bin, shards"], tmp_path / "both")
    for path in folders["safetensors, shards"].iterdir():
        shutil.copy(path, folder)
    for name in ("tf_model.h5", "README.md", "flax_model.msgpack", "vocab.json"):
        (folder / name).write_text("{}")
    hub.repos["org/model"] = {commit(2): folder}
    with connected(hub.address, tmp_path / "cache"):
        first = fetch(HubId("org/model"), "here", TeacherError)
        assert sorted(hub.downloads()) == sorted(
            path.name for path in folders["safetensors, shards"].iterdir()
        )
        assert first.id == HubId("org/model", commit(2))
        hub.requests.clear()
        assert fetch(first.id, "here", TeacherError) == first
        assert hub.requests == []  # a commit never changes
        assert fetch(HubId("org/model"), "here", TeacherError) == first
        assert hub.downloads() == []


def test_a_pinned_id_keeps_its_version(folders, hub, tmp_path):
    with connected(hub.address, tmp_path / "cache"):
        old = pin(HubId("org/model"), "here", TeacherError)
        hub.repos["org/model"][commit(3)] = folders["safetensors, one"]
        assert pin(HubId("org/model"), "here", TeacherError).revision == commit(3)
        assert pin(HubId("org/model", "v1"), "here", TeacherError) == old
        assert fetch(old, "here", TeacherError).folder.name == old.revision == commit(1)
        load_upstream(str(old), "here")
    assert same_model(str(old), "org/model") and same_model("org/model@v1", str(old))
    assert not same_model(str(old), f"org/model@{commit(3)}")
    assert not same_model(str(old), "org/other")


def test_the_cache_serves_without_a_network(hub, tmp_path, caplog):
    with connected(hub.address, tmp_path):
        online = fetch(HubId("org/model"), "here", TeacherError)
    with connected(UNREACHABLE, tmp_path):
        assert fetch(HubId("org/model"), "here", TeacherError) == online
        assert "cannot be reached" in caplog.text and commit(1) in caplog.text
    with connected(hub.address, tmp_path, offline=True):
        hub.requests.clear()
        assert fetch(HubId("org/model"), "here", TeacherError) == online
        assert pin(HubId("org/model"), "here", TeacherError) == online.id
        assert hub.requests == []
    next(online.folder.glob("*-00001-*")).unlink()
    for address, offline in ((UNREACHABLE, False), (hub.address, True)):
        with connected(address, tmp_path, offline), pytest.raises(TeacherError, match="hf downl"):
            fetch(online.id, "here", TeacherError)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/nothing", ["no such file or folder org/nothing", "hf auth login"]),
        ("org/model@v9", ["org/model", "v9"]),
        ("org/gated", ["org/gated", "terms", "hf auth login"]),
        ("org/empty", ["org/empty", "config.json"]),
        ("org/no_weights", ["org/no_weights", "pytorch_model.bin"]),
    ],
)
def test_failures_say_what_to_do(folders, hub, tmp_path, text, parts):
    (tmp_path / "empty").mkdir()
    no_weights = shutil.copytree(folders["bin, one"], tmp_path / "no_weights")
    (no_weights / "pytorch_model.bin").unlink()
    hub.repos["org/empty"] = {commit(5): tmp_path / "empty"}
    hub.repos["org/no_weights"] = {commit(6): no_weights}
    hub.repos["org/gated"] = {commit(7): folders["bin, one"]}
    hub.gated.add("org/gated")
    with connected(hub.address, tmp_path / "cache"), pytest.raises(TeacherError) as error:
        load_upstream(text, "teachers.h.model")
    for part in ("teachers.h.model: ", *parts):
        assert part in str(error.value)


def test_a_run_keeps_the_commit_of_its_teachers(
    hub, folders, pretrain_folder, pretrain, tmp_path, caplog
):
    """The repository changes between a run and its continuation, which gets the first version."""
    with edit_yaml(pretrain_folder / "model.yaml") as config:
        config["teachers"] = {"h": {"model": "org/model", "layers": [2]}}
        config["init"] = {"teacher": "h"}
    caplog.set_level("INFO")
    files = ("-c", "runner.yaml", "-g", "model.yaml", "--device", "cpu")
    with connected(hub.address, tmp_path / "cache"):
        code, output = pretrain(*files, "-n", "x", "-o", "config.runner.total_steps=4")
        assert code == 0, output
        assert f"org/model@{commit(1)}" in caplog.text
        states = saved_states("x")
        pinned = states["Upstream_Config"]["teachers"]["h"]["model"]
        assert pinned == f"org/model@{commit(1)}"
        assert states["EKD"]["about"]["config"]["teachers"]["h"]["model"] == pinned
        hub.repos["org/model"][commit(9)] = folders["safetensors, one"]
        hub.requests.clear()
        code, output = pretrain(*files, "-n", "x", "-a", "-o", "config.runner.total_steps=6")
        assert code == 0, output
        assert hub.requests == []
        states = saved_states("x")
        assert states["Step"] == 6
        assert states["Upstream_Config"]["teachers"]["h"]["model"] == pinned
        with edit_yaml(pretrain_folder / "model.yaml") as config:
            config["teachers"]["h"]["model"] = f"org/model@{commit(9)}"
        code, output = pretrain(*files, "-n", "x", "-a", "-o", "config.runner.total_steps=8")
        assert code == 2 and commit(9) in output
        with edit_yaml(pretrain_folder / "model.yaml") as config:
            config["teachers"]["h"]["model"] = "org/nothing"
        code, output = pretrain(*files, "-n", "y")
        assert code == 2 and "Traceback" not in output
        assert "error: teachers.h.model: no such file or folder org/nothing" in output


@pytest.mark.slow
def test_in_a_fresh_process(hub, tmp_path):
    """HF_ENDPOINT and HF_HOME are huggingface_hub's own."""
    (tmp_path / "model.yaml").write_text("teachers: {h: {model: org/model, layers: [1]}}")
    env = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    argv = ("doctor", "--teachers", "model.yaml", "--json")
    done = command(*argv, cwd=tmp_path, **env, HF_HUB_OFFLINE="0")
    (teacher,) = json.loads(done.stdout)["teachers"]
    assert teacher["model"] == f"org/model@{commit(1)}" and teacher["verdict"] == "ok"
    assert "HTTP Request" not in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "home").rglob("pytorch_model-*.bin"))
