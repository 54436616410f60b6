"""tools/gpu_check.py: its parts, time limits and report, at toy size on the CPU."""

import json
import os
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import gpu_check
import pytest
from gpu_parts.report import markdown

from .conftest import REPO


def row(low, median, high, flops, waits=None):
    return {
        "rate": [low, median, high], "flops": flops, "peak": 3 * 2**30, "waits": waits,
        "waits_at": [], "kernels": [{"name": "gemm", "share": 0.25}], "batch": 24,
    }  # fmt: skip


def part(**result):
    return {"status": "passed", "seconds": 1.0, "result": result}


def cells(text, name):
    lines = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in lines[0].strip("|").split("|")][1:]


def test_figures_of_the_report_worked_out():
    variants = {
        "s3prl": {**row(90, 100, 110, 8e10), "numbers": "float32"},
        "bf16": {**row(5000, 5200, 5300, 5e10, waits=0.0), "numbers": "bfloat16"},
        "bf16 cached int8": {**row(7900, 8000, 8100, 1e10, waits=1.5), "numbers": "bfloat16"},
        "bf16 compiled": {"error": "a|b", "batch": 24, "numbers": "bfloat16"},
    }
    base = part(
        seconds=15.0,
        matmul_rates={"float32": 4e13, "bfloat16": 8e14},
        variants=variants,
        cache_bytes={"int8": 350_000.0},
    )
    losses = {"float32": [2.0, 1.0], "bfloat16": [2.02, 1.0]}
    training = part(interval=10, losses=losses, mean_difference=0.005, largest_difference=0.01)
    tests = part(passed=7, failed=["test_x[cuda]"], skipped=[])
    parts = {"environment": part(device="NVIDIA H200", auto="bfloat16"), "base": base}
    parts |= {"tests": tests, "training": training}
    text = markdown({"toy": False, "seconds": 9.0, "parts": parts})
    # 8e10 operations for a second of audio, 100 of them: 8e12 of 4e13 a second
    assert cells(text, "s3prl") == ["24", "100 (90 to 110)", "1.00", "20 %", "3.00", ""]
    # 2.6e14 of 8e14
    assert cells(text, "bf16")[1:4] == ["5,200 (5,000 to 5,300)", "52.00", "32 %"]
    assert cells(text, "bf16 cached int8")[-1] == "1.5"
    assert cells(text, "bf16 compiled")[1] == "a/b"
    assert "bf16: 5,000; reached with 5,200" in text
    assert "bf16 cached: 9,000; missed with 8,000" in text
    assert "0.350 MB" in text and "2.80 GB/s" in text  # 8,000 times 350 kB
    assert cells(text, "bfloat16") == ["2.02000", "1.00000"] and "at most 1.000 %" in text
    assert "- failed: test_x[cuda]" in text


def run(tmp_path, code, limit):
    (tmp_path / "temporary").mkdir()
    result = tmp_path / "temporary" / "x.json"
    command = [sys.executable, "-c", code, str(result)]
    return gpu_check.run_part(command, result.with_suffix(""), limit, REPO)


def test_a_part_that_fails_is_recorded_with_its_output(tmp_path):
    code = "import sys; open(sys.argv[1], 'w').write('{\"a\": 1}'); print('why'); sys.exit(3)"
    part = run(tmp_path, code, 30)
    assert part["status"] == "failed" and part["error"] == "why" and part["result"] == {"a": 1}


def test_a_part_out_of_time_ends_with_its_children_and_keeps_its_result(tmp_path):
    code = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write('{"child": %d}' % child.pid)
time.sleep(60)
"""
    begin = time.monotonic()
    part = run(tmp_path, code, 2)
    assert time.monotonic() - begin < 30 and part["status"].startswith("out of time")
    child = part["result"]["child"]
    for _ in range(50):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    # a zombie of a container without init still has its number
    state = open(f"/proc/{child}/stat").read().rpartition(")")[2].split()[0]
    assert state == "Z"


def written(folder):
    assert {path.name for path in folder.iterdir()} == {"gpu_check.json", "gpu_check.md"}
    return json.loads((folder / "gpu_check.json").read_text())["parts"]


def test_a_failed_part_does_not_stop_the_others_but_the_time_does(tmp_path, monkeypatch):
    limits, seconds = [], [0.0]

    def run_part(command, folder, limit, project):
        limits.append(limit)
        seconds[0] += 130
        failed = folder.name == "base"
        return {"status": "failed" if failed else "passed", "seconds": 130, "result": {}}

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    assert gpu_check.main(["-o", str(tmp_path / "out"), "--minutes", "9"]) == 1
    parts = written(tmp_path / "out")
    statuses = [part["status"] for part in parts.values()]
    assert list(parts) == list(gpu_check.LIMITS)
    assert statuses == ["passed", "failed", *["passed"] * 3, "skipped: no time left"]
    # the fifth begins after 520 of 540 s and leaves 5 s to end it
    assert limits == [60, 270, 150, 90, 15]


def test_without_a_device_nothing_else_is_run(tmp_path, monkeypatch):
    part = {"status": "failed", "seconds": 1.0, "result": {}}
    monkeypatch.setattr(gpu_check, "run_part", lambda *args: part)
    assert gpu_check.main(["-o", str(tmp_path)]) == 1
    statuses = [part["status"] for part in written(tmp_path).values()]
    assert statuses == ["failed", *["skipped"] * 5]


@pytest.mark.parametrize("argv", ["--device cpu", "--wheels EMPTY --device cpu --toy", "-o USED"])
def test_an_invalid_option_exits_with_2(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("EMPTY", "USED"):
        (tmp_path / name).mkdir()
    (tmp_path / "USED/gpu_check.json").touch()
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["-o", "out", *argv.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert argv.split()[1] in error


def gpu_check_command(*argv, cwd):
    command = [sys.executable, str(REPO / "tools/gpu_check.py"), "--device", "cpu", "--toy", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def test_the_environment_is_recorded(tmp_path):
    done = gpu_check_command("-o", "out", "--only", "environment", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = written(tmp_path / "out")["environment"]["result"]
    assert result["device"] == "CPU" and result["python"] == sys.version.split()[0]


@pytest.mark.slow
def test_the_whole_check_at_toy_size(tmp_path):
    done = gpu_check_command("-o", "out", "--minutes", "60", cwd=tmp_path)
    parts = written(tmp_path / "out")
    assert done.returncode == 0, parts
    for size in ("base", "tiny"):
        rows = parts[size]["result"]["variants"]
        assert list(rows) == ["s3prl", "float32", "cached int8"]
        for row in rows.values():
            assert row["rate"][0] > 0 and row["flops"] > 1e6 and len(row["kernels"]) == 5
        assert rows["cached int8"]["flops"] < 0.7 * rows["float32"]["flops"]
        # three teachers, three layers of 96 dimensions, 50 frames a second, and the scales
        assert parts[size]["result"]["cache_bytes"]["int8"] == pytest.approx(
            3 * 3 * 96 * 50, rel=0.1
        )
    assert parts["training"]["result"]["largest_difference"] == 0  # float32 twice
    assert len(parts["torchrun"]["result"]["losses"]) == 4
    assert parts["tests"]["result"]["failed"] == []


@pytest.mark.slow
def test_wheels_and_the_checkout_are_installed_elsewhere(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        info = "carried-1.0.dist-info"
        wheel.writestr("carried.py", "VALUE = 7\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        text = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", text)
        wheel.writestr(f"{info}/RECORD", "")
    python, project = gpu_check.install(wheels, tmp_path)
    code = "import carried, torch, s3prl_ekd.upstream as u; print(carried.VALUE, u.__file__)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["7", str(project / "upstream/__init__.py")], done.stderr
