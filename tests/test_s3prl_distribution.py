"""Which distribution the module ``s3prl`` comes from: s3prl, espnet-s3prl, both, or none."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

from s3prl_ekd import cli, compat
from s3prl_ekd.commands import doctor
from s3prl_ekd.errors import SetupError
from s3prl_ekd.system import s3prl_distribution
from s3prl_ekd.system.s3prl_distribution import installation, missing_s3prl, require_s3prl

from .conftest import REPO

FILES = {"__init__.py": "", "hub.py": "names = []\n", "util/audio.py": "rate = 16000\n"}
FORK = {**FILES, "hub.py": "names = ['espnet']\n"}


def install(site: Path, name: str, version: str, files: dict[str, str], top_level=True) -> None:
    """Install a module ``s3prl`` as pip does: over what is there, with RECORD."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    rows = [f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]
    for file, text in files.items():
        path = site / "s3prl" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()
        rows.append(f"s3prl/{file},sha256={digest.rstrip('=')},{len(text)}")
    (info / "RECORD").write_text("\n".join(rows) + "\n")
    if top_level:
        (info / "top_level.txt").write_text("s3prl\n")


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """An empty site-packages, the only one on Python's path."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder)])
    for name in [name for name in sys.modules if name.split(".")[0] == "s3prl"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    return folder


def test_the_distribution_is_that_of_the_standard_library():
    found = installation()
    claimed = set(metadata.packages_distributions()["s3prl"])
    assert {claim.name for claim in found.claims} == claimed
    assert found.folder == Path(util.find_spec("s3prl").origin).parent.resolve()
    for claim in found.claims:
        assert claim.version == metadata.version(claim.name) and str(claim) in str(found)
    assert found.problem == "" and missing_s3prl() == ""


@pytest.mark.parametrize("top_level", [True, False])
@pytest.mark.parametrize("name", ["s3prl", "espnet-s3prl"])
def test_one_distribution(site, name, top_level):
    install(site, name, "2026.5.14", FILES, top_level)
    found = installation()
    assert str(found) == f"{name} 2026.5.14 ({site}/s3prl)" and found.problem == ""


@pytest.mark.parametrize("last", ["s3prl", "espnet-s3prl"])
def test_one_distribution_over_another(site, last):
    """The fork stays, because ESPnet needs it. The counts tell whose files are there."""
    files = {"s3prl": ("0.4.18", FILES), "espnet-s3prl": ("2026.5.14", FORK)}
    for name in sorted(files, key=lambda name: name == last):
        install(site, name, *files[name])
    found = installation()
    (overwritten,) = files.keys() - {last}
    claims = {claim.name: claim for claim in found.claims}
    assert s3prl_distribution.replaced_files(claims[last]) == []
    assert s3prl_distribution.replaced_files(claims[overwritten]) == ["s3prl/hub.py"]
    assert f"1 files of {overwritten}" in found.problem
    assert found.problem.endswith(
        "pip uninstall -y s3prl && pip install --force-reinstall --no-deps espnet-s3prl==2026.5.14"
    )
    require_s3prl()  # a warning, no error: the module may still work


def test_the_repair_repairs(site):
    """``pip uninstall s3prl`` removes the files of both; the reinstallation restores the fork."""
    install(site, "espnet-s3prl", "2026.5.14", FORK)
    install(site, "s3prl", "0.4.18", FILES)
    for line in (site / "s3prl-0.4.18.dist-info/RECORD").read_text().splitlines():
        (site / line.split(",")[0]).unlink(missing_ok=True)
    (site / "s3prl-0.4.18.dist-info/top_level.txt").unlink()
    (site / "s3prl-0.4.18.dist-info").rmdir()
    importlib.invalidate_caches()
    with pytest.raises(SetupError, match="espnet-s3prl 2026.5.14 are missing.*--force-reinstall"):
        require_s3prl()
    for path in sorted((site / "espnet_s3prl-2026.5.14.dist-info").iterdir()):
        path.unlink()
    (site / "espnet_s3prl-2026.5.14.dist-info").rmdir()
    install(site, "espnet-s3prl", "2026.5.14", FORK)
    importlib.invalidate_caches()
    assert installation().problem == ""


def test_without_a_distribution(site):
    assert missing_s3prl().endswith("type: pip install s3prl")
    (site / "s3prl").mkdir()  # as in the folder around s3prl's repository
    importlib.invalidate_caches()
    assert missing_s3prl().endswith("type: pip install s3prl")
    (site / "espnet-202611.dist-info").mkdir()
    (site / "espnet-202611.dist-info/METADATA").write_text("Name: espnet\nVersion: 202611\n")
    importlib.invalidate_caches()
    assert missing_s3prl().endswith("type: pip install --no-deps espnet-s3prl")


def test_a_checkout(site):
    (site / "s3prl").mkdir()
    (site / "s3prl/__init__.py").touch()
    (site / "s3prl/version.txt").write_text("0.4.18\n")
    assert str(installation()) == f"0.4.18 (checkout, {site}/s3prl)"
    assert installation().problem == ""


def test_commands_warn_once_about_two_distributions(monkeypatch, tmp_path, caplog, capsys):
    """Beside the real one, whose files are its own."""
    real = {claim.name for claim in installation().claims}
    (other,) = {"s3prl", "espnet-s3prl"} - real
    install(tmp_path / "site", other, "0.0.1", {})
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(s3prl_distribution, "_announced", False)
    for _ in range(2):
        compat.apply()
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert f"{other} 0.0.1" in warning and warning == installation().problem
    report = {**doctor_report(tmp_path), "s3prl_problem": installation().problem}
    lines = doctor.as_text(report).splitlines()
    (index,) = [i for i, line in enumerate(lines) if line.split()[:1] == ["s3prl"]]
    assert lines[index + 1].strip() == warning


def doctor_report(folder: Path) -> dict:
    rows = {"versions": {"s3prl": "x"}, "torch_load": "", "shims": [], "devices": {}}
    audio = {"torchaudio_repair": "", "decoder": "x", "formats": {}}
    pretrain = {"ready": True, "problems": []}
    more = {"pretrain": pretrain, "recipes": [], "folder": doctor._folder(folder)}
    return {**rows, "audio": audio, **more}


# --- without s3prl


@pytest.fixture(scope="module")
def without_s3prl(tmp_path_factory) -> Path:
    """The packages of this environment and this one, without s3prl."""
    folder = tmp_path_factory.mktemp("without")
    installed = {Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")}
    for path in (path for site in installed for path in site.iterdir()):
        ours = path.name.lower().startswith(("s3prl", "espnet_s3prl", "__editable__", "__pycache"))
        if not ours and path.suffix != ".pth" and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    package = folder / "s3prl_ekd"
    package.mkdir()
    for path in (REPO / "s3prl_ekd").iterdir():
        (package / path.name).symlink_to(path)
    for name in ("upstream", "pretrain_configs", "downstream_recipes"):
        (package / name).symlink_to(REPO / name)
    return folder


# Runs each command of a JSON list; prints exit codes and the last lines of stderr as JSON.
IN_TURN = """
import contextlib, io, json, sys, traceback
from s3prl_ekd.__main__ import main

results = []
for argv in json.loads(sys.argv[1]):
    sys.argv, out, err, code = ["s3prl-ekd", *argv], io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
    results.append((code, err.getvalue(), out.getvalue()))
print(json.dumps(results))
"""
NEED = [
    "run_pretrain.py -u ekd -n x",
    "run_pretrain.py -h",
    "run_downstream.py -m train -u fbank -d asr -n x",
    "superb fbank --tasks asr",
    "push student.pt me/x --dry-run",
    "probe fbank --data x.tsv",
    "sweep -c pretrain/ekd/config_runner.yaml pretrain/ekd/config_model.yaml",
    "prune student.pt -o p.pt",
    "merge student.pt student.pt -o p.pt",
    "export student student.pt -o p.pt",
    "export hf student.pt -o p",
    "export onnx student.pt -o p.onnx",
    "export superb student.pt -o p",
    "cost -u fbank",
    "features student.pt . -o f.safetensors",
    "teachers list",
    "group-layers pretrain/ekd/config_model.yaml --data . -o p.yaml",
    "cache -c pretrain/ekd/config_runner.yaml -g pretrain/ekd/config_model.yaml -o c",
    "fit-units pretrain/ekd/config_model.yaml --teacher hubert --layer 1 --data . -o u",
    "essence asr --teachers a.ckpt -n x",
    "recipe ekd960",
    "demo demo_run",
    "json.tool x.json",
]
NO_NEED = ["init .", "--version", "superb -h", "validate -h", "init again"]


def run_without(site: Path, folder: Path, commands: list[str]) -> list:
    # -S: without the folders of this environment
    process = subprocess.run(
        [sys.executable, "-S", "-c", IN_TURN, json.dumps([text.split() for text in commands])],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_commands_without_s3prl_say_what_to_type(without_s3prl, tmp_path):
    results = run_without(without_s3prl, tmp_path, [*NO_NEED, *NEED, "doctor --json"])
    for text, (code, err, _) in zip(NO_NEED, results, strict=False):
        assert code in (0, None) and not err, (text, err)
    for text, (code, err, _) in zip(NEED, results[len(NO_NEED) :], strict=False):
        lines = [line for line in err.splitlines() if not line.startswith("INFO ")]
        assert len(lines) == 1, (text, err)
        line = lines[0]
        assert code == 2 and line.startswith("error: s3prl is not installed; type: pip "), text
    assert {path.name for path in tmp_path.iterdir()} == {"again", "downstream", "pretrain"}
    code, _, out = results[-1]
    report = json.loads(out)
    assert code == 1 and report["versions"]["s3prl"] is None
    assert "pip install" in report["s3prl_problem"]
    assert not report["pretrain"]["ready"] and report["audio"]["formats"]["FLAC"]
    assert [shim["state"] for shim in report["shims"]][0] in ("fired", "not needed")
    assert cli.NEED_S3PRL <= {text.split()[0] for text in NEED}


def test_python_without_s3prl(without_s3prl, tmp_path):
    code = (
        "import s3prl_ekd\n"
        "for call in (s3prl_ekd.register, lambda: s3prl_ekd.load_student('x.pt')):\n"
        "    try:\n"
        "        call()\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(without_s3prl)}
    argv = [sys.executable, "-S", "-c", code]
    out = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    lines = out.splitlines()
    assert len(lines) == 2 and all(line.startswith("SetupError s3prl is not") for line in lines)
