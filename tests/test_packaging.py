"""Wheel and sdist contain all files; importing is fast."""

import ast
import email
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import resources

import pytest

from s3prl_ekd.teachers.zoo import TEACHERS

from .conftest import REPO

DATA = [
    "s3prl_ekd/py.typed",  # type annotations for other packages (PEP 561)
    *(str(path.relative_to(REPO)) for path in (REPO / "pretrain_configs").rglob("*.yaml")),
    *(
        str(path.relative_to(REPO))
        for path in (REPO / "downstream_recipes").rglob("*")
        if path.is_file() and path.suffix in (".yaml", ".dict", ".txt")
    ),
    *(f"s3prl_ekd/teachers/zoo/files/{name}.pt" for name in TEACHERS),
    *(f"s3prl_ekd/teachers/zoo/cards/{name}.md" for name in TEACHERS),
]
MODULES = [
    str(path.relative_to(REPO))
    for folder in ("s3prl_ekd", "upstream", "pretrain_configs", "downstream_recipes")
    for path in (REPO / folder).rglob("*.py")
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist of a copy of the project, built with its backend."""
    copy = tmp_path_factory.mktemp("build") / "project"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "*.egg-info", "__pycache__", "demo_run", "build"
    )
    shutil.copytree(REPO, copy, ignore=ignored)
    for kind in ("wheel", "sdist"):
        code = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
        argv = [sys.executable, "-c", code, str(copy.parent)]
        process = subprocess.run(argv, cwd=copy, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
    (wheel,) = copy.parent.glob("*.whl")
    (sdist,) = copy.parent.glob("*.tar.gz")
    return wheel, sdist


def test_the_file_lists_are_not_empty():
    assert len(DATA) >= 40 and len(MODULES) > 40


def test_the_wheel_has_all_files_in_one_package(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    for path in DATA + MODULES:
        inside = path if path.startswith("s3prl_ekd/") else f"s3prl_ekd/{path}"
        assert inside in names, path
    assert built[0].stat().st_size < 25_000_000
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"s3prl_ekd"}


def test_the_sdist_has_all_files(built):
    names = {name.split("/", 1)[-1] for name in tarfile.open(built[1]).getnames()}
    others = ["setup.py", "pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE"]
    others += ["requirements-espnet.txt", "tests/requirements_espnet.txt"]
    others += ["CITATION.cff", "tests/conftest.py", "tests/written_by_0_1/files.tar.gz"]
    for path in [*DATA, *MODULES, *others]:
        assert path in names, path


def test_the_requirements_beside_espnet_are_the_wheels(built):
    """All but s3prl, which ESPnet has in its own distribution, and what ESPnet brings."""
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(wheel.read(name))
    required = {text for text in metadata.get_all("Requires-Dist") if ";" not in text}
    apart = {text for text in required if text.split(">")[0] in ("s3prl", "torch", "torchaudio")}
    lines = (REPO / "requirements-espnet.txt").read_text().splitlines()
    assert {line for line in lines if not line.startswith("#")} == required - apart
    assert len(apart) == 3


def test_an_unpacked_wheel_works(built, tmp_path):
    """Without this checkout on the path: it finds its data files and the hubconf."""
    zipfile.ZipFile(built[0]).extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        # an editable install of the checkout has precedence over the folder
        "sys.meta_path[:] = [f for f in sys.meta_path if '_EditableFinder' not in repr(f)]\n"
        "import s3prl_ekd, s3prl_ekd.workspace as w\n"
        "assert s3prl_ekd.__file__.startswith(sys.argv[1]), s3prl_ekd.__file__\n"
        "print(*(name for name, _ in w.workspace_files()))\n"
        "import s3prl_ekd.upstream.hubconf as h; print(h.ekd_student.__name__)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    for name in ("pretrain/ekd/config_model.yaml", "downstream/asr/char.dict", "ekd_student"):
        assert name in process.stdout.split()


def test_this_install_has_the_data():
    assert (resources.files("s3prl_ekd") / "py.typed").is_file()
    assert (resources.files("s3prl_ekd.pretrain_configs") / "config_model.yaml").is_file()
    assert (resources.files("s3prl_ekd.downstream_recipes") / "asr" / "config.yaml").is_file()


def test_importing_is_fast():
    """It imports neither torch nor s3prl, and takes less than 50 ms (minimum of 5 runs)."""
    code = (
        "import sys, time; start = time.perf_counter(); import s3prl_ekd\n"
        "print(time.perf_counter() - start, 'torch' in sys.modules, 's3prl' in sys.modules)"
    )
    durations = []
    for _ in range(5):
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        seconds, torch_loaded, s3prl_loaded = out.stdout.split()
        assert (torch_loaded, s3prl_loaded) == ("False", "False")
        durations.append(float(seconds))
    assert min(durations) < 0.05


def test_distill_imports_only_errors():
    """Of this package, distill/ imports only itself and errors."""
    for path in (REPO / "s3prl_ekd" / "distill").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2 or node.module == "errors", path.name
                assert not (node.level == 0 and node.module.startswith("s3prl_ekd")), path.name
