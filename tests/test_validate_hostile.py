"""`s3prl-ekd validate` on hostile packages.

Checks run outside of the package's process, on its outputs, and none of its processes is left.
"""

import io
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.export.hidden_set import messages, sandbox
from s3prl_ekd.export.hidden_set.package import package_contents, write_package
from s3prl_ekd.student_file import LoadedStudent

from .conftest import STUDENT

FIRST_CHECKS = ("weights", "import", "build", "forward", "lists")


@pytest.fixture(scope="module")
def honest_package(tmp_path_factory):
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("honest")
    student = Student(StudentSettings(**STUDENT)).eval()
    write_package(package_contents(LoadedStudent(student, None, {}, {}), False), "a card", folder)
    for name in ("LICENSE", "README.md"):
        (folder / name).touch()
    return folder


@pytest.fixture
def write_hostile(honest_package, tmp_path):
    """Writes a package with extra code: at module level of its expert.py, and in its forward."""

    def write(top: str = "", forward: str = "return out") -> Path:
        folder = tmp_path / "package"
        shutil.copytree(honest_package, folder)
        source = (folder / "expert.py").read_text()
        body = f"        out = _Good.forward(self, wavs)\n        {forward}\n"
        subclass = "_Good = UpstreamExpert\n\n\nclass UpstreamExpert(_Good):\n"
        source += f"\n\n{top}\n\n\n{subclass}    def forward(self, wavs):\n{body}"
        (folder / "expert.py").write_text(source)
        return folder

    return write


def has_namespaces() -> bool:
    """Whether this system allows network namespaces."""
    code = "from s3prl_ekd.export.hidden_set.isolation import leave_network; print(leave_network())"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return process.stdout == "True\n"


def outcomes(folder, names=FIRST_CHECKS, limit=100.0):
    results, _ = sandbox.validate(folder, {"short": [16_000]}, limit, names=names)
    return {outcome.name: outcome for outcome in results}


ATTACK = """
import ctypes, os, socket, subprocess, sys, time

NOTES = {notes!r}


def note(name, text):
    with open(os.path.join(NOTES, name), "w") as file:
        file.write(text)


def attempt(function):
    try:
        function()
    except BaseException as error:
        return repr(error)


def read(path):
    with open(path, "rb") as file:
        return file.read().decode(errors="replace")


def write(path):
    with open(path, "w") as file:
        file.write('{{"name": "values", "status": "pass", "reason": "forged"}}')


note("environment", repr(dict(os.environ)))
attempt(lambda: note("parent", read("/proc/%d/environ" % os.getppid())))
for path in [*sys.argv, *os.listdir(".")]:
    if os.path.exists(path):
        note("written", path)
        attempt(lambda: write(path))
os.write(1, b"noise\\n" * 4_000_000)
os.write(2, b"noise\\n" * 4_000_000)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        note("daemon", str(os.getpid()))
        time.sleep(1000)
    os._exit(0)
while not os.path.exists(os.path.join(NOTES, "daemon")):
    time.sleep(0.01)

HERE = ("127.0.0.1", {port})
SEND = "import socket; socket.socket(type=2).sendto(b'out', %r)" % (HERE,)
udp = socket.socket(type=socket.SOCK_DGRAM)
attempt(lambda: udp.sendto(b"out", HERE))
attempt(lambda: udp.sendmsg([b"out"], (), 0, HERE))
attempt(lambda: udp.connect(HERE) or udp.send(b"out"))
{program}
"""


def test_environment_network_processes_and_pipes(write_hostile, tmp_path, monkeypatch):
    """The package gets no token and no file name of ours, sends no datagram, leaves no process
    behind, and cannot block a pipe by filling it."""
    notes = tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setenv("HF_TOKEN", "a-secret-token")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    offline = has_namespaces()
    with socket.socket(type=socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.setblocking(False)
        port = listener.getsockname()[1]
        # Only a network namespace blocks other programs.
        program = "subprocess.run([sys.executable, '-c', SEND])" if offline else ""
        top = ATTACK.format(notes=str(notes), port=port, program=program)
        results = outcomes(write_hostile(top), (*FIRST_CHECKS, "network"))
        with pytest.raises(BlockingIOError):
            listener.recv(10)
    assert [results[name].status for name in FIRST_CHECKS] == ["pass"] * len(FIRST_CHECKS)
    assert results["network"].status == "fail" and "127.0.0.1" in results["network"].reason
    environment = (notes / "environment").read_text()
    assert "'OMP_NUM_THREADS': '1'" in environment and "a-secret-token" not in environment
    if offline and (notes / "parent").exists():
        assert "a-secret-token" not in (notes / "parent").read_text()
    assert not (notes / "written").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((notes / "daemon").read_text()), 0)


FORGE = """
import json, os

facts = {"type": "dict", "module": True, "keys": []}
body = (2).to_bytes(8, "little") + b"{}"  # safetensors format, without a tensor
message = json.dumps({"facts": facts, "bytes": len(body)}).encode() + b"\\n" + body
for number in range(64):
    try:
        os.write(number, message)
    except OSError:
        pass
"""


def test_forged_replies_do_not_pass_checks(write_hostile):
    """Data that it writes to the pipes is read as its outputs, which are then wrong or missing."""
    results = outcomes(write_hostile(FORGE), (*FIRST_CHECKS, "values"))
    assert results["syntax"].status == "pass"  # the attack is run
    assert results["values"].status != "pass" and results["forward"].status != "pass"
    assert "fail" in {outcome.status for outcome in results.values()}


FAILURES = {  # code in forward -> text in the reason
    "__import__('os')._exit(0)": "exit code 0",
    "__import__('os').closerange(0, 64)": "",
    "raise SystemExit(0)": "SystemExit",
    "return {'hidden_states': [torch.zeros(1).expand(1, 1 << 15, 1 << 15)]}": "268,435,456",
}


@pytest.mark.parametrize("line", FAILURES)
def test_a_process_that_ends_fails_the_check(write_hostile, line):
    results = outcomes(write_hostile(forward=line))
    assert results["forward"].status == "fail" and FAILURES[line] in results["forward"].reason
    assert results["lists"].status == "skip"


OBJECTS = """
class Sub(torch.Tensor):
    pass


class Code:
    def __reduce__(self):
        return (exec, ("open({path!r}, 'w')",))

    def __repr__(self):
        return chr(27) + "[2J"


Code.__name__ = chr(27) + "[2J" + "x" * 100_000
"""


def test_objects_are_received_as_plain_data(write_hostile, tmp_path):
    """Tensors without their subclass; of other objects a short printable name of their type."""
    top = OBJECTS.format(path=str(tmp_path / "ran"))
    line = "return {**out, 'hidden_states': [s.as_subclass(Sub) for s in out['hidden_states']], "
    line += "'PR': Code()}"
    results = outcomes(write_hostile(top, line))
    assert results["forward"].status == "pass" and results["lists"].status == "fail"
    reason = results["lists"].reason
    assert reason.startswith("PR ") and "?[2Jxx" in reason and len(reason) < 600
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_files_that_cannot_be_parsed(write_hostile):
    """Opening a named pipe would block; deep nesting exceeds the limits of Python's parser."""
    folder = write_hostile()
    os.mkfifo(folder / "pipe.py")
    results = outcomes(folder, ())
    assert results["syntax"].status == "fail" and "pipe.py" in results["syntax"].reason
    (folder / "pipe.py").unlink()
    (folder / "deep.py").write_text("x = " + "-" * 50_000 + "1\n")
    assert outcomes(folder, ())["syntax"].status == "fail"
    (folder / "deep.py").write_text("#" * 20_000_000)
    assert outcomes(folder, ())["syntax"].status == "fail"


TENSORS = [torch.randn(2, 3), torch.tensor(7), torch.tensor([True, False]), torch.empty(0, 4)]


def test_messages_round_trip():
    file = io.BytesIO()
    sent = [torch.randn(3).half(), TENSORS[0][:, ::2], *TENSORS]
    messages.send(file, {"a": [1, None, "ü"]}, sent)
    file.seek(0)
    facts, tensors = messages.receive(file)
    assert facts == {"a": [1, None, "ü"]}
    for original, received in zip(sent, tensors, strict=True):
        assert original.dtype == received.dtype and torch.equal(original, received)


def _message(body: bytes, facts=None, size=None) -> bytes:
    head = {"facts": {} if facts is None else facts, "bytes": len(body) if size is None else size}
    return json.dumps(head).encode() + b"\n" + body


def _tensors(dtype: str, shape: list, data: bytes, name: str = "0") -> bytes:
    """A message with one tensor, in safetensors format."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}
    head = json.dumps({name: entry}).encode()
    return _message(len(head).to_bytes(8, "little") + head + data)


EMPTY = (2).to_bytes(8, "little") + b"{}"  # safetensors format, without a tensor
MALFORMED = {
    "a huge head": _message(EMPTY, facts={"a": "x" * messages.MAX_JSON}),
    "a huge body": _message(b"", size=1 << 62),
    "a negative length": _message(EMPTY, size=-1),
    "no JSON": b"{\n",
    "no UTF-8": b"\xff\n",
    "deep JSON": b"[" * 100_000 + b"\n",
    "a list": b"[]\n",
    "a long integer": b"9" * 10_000 + b"\n",
    "facts that are no dict": _message(EMPTY, facts=["a"]),
    "no safetensors": _message(b"{}"),
    "a pickle": _message(pickle.dumps({"0": 1})),
    "a huge safetensors head": _message((1 << 62).to_bytes(8, "little") + b"{}"),
    "unknown dtype": _tensors("object", [1], bytes(8)),
    "a dtype without arithmetic": _tensors("F8_E4M3", [1], bytes(1)),
    "another name": _tensors("F32", [1], bytes(4), name="1"),
    "a negative size": _tensors("F32", [-1, -1], bytes(4)),
    "a bool as size": _tensors("U8", [True], bytes(1)),
    "too few bytes": _tensors("F32", [2], bytes(4)),
    "too many bytes": _tensors("F32", [2], bytes(12)),
    "a huge number of elements": _tensors("U8", [1 << 28, 1 << 28], b""),
    "many dimensions": _tensors("U8", [1] * 100_000, bytes(1)),
    "a bool of value 2": _tensors("BOOL", [1], b"\2"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_messages_are_an_error(name):
    with pytest.raises(messages.BadMessage):
        messages.receive(io.BytesIO(MALFORMED[name]))


def test_too_many_elements_are_an_error(monkeypatch):
    message = _tensors("U8", [9], bytes(9))
    monkeypatch.setattr(messages, "MAX_NUMBERS", 9)
    messages.receive(io.BytesIO(message))
    monkeypatch.setattr(messages, "MAX_NUMBERS", 8)
    with pytest.raises(messages.BadMessage):
        messages.receive(io.BytesIO(message))


def test_damaged_messages_raise_only_expected_exceptions():
    file = io.BytesIO()
    tensors: list[torch.Tensor] = []
    result = {"hidden_states": [*TENSORS], "PR": (TENSORS[0], {"a": object()})}
    facts = {"result": messages.describe(result, tensors)}
    messages.send(file, facts, tensors)
    message, rng = file.getvalue(), random.Random(0)
    assert list(messages.rebuild(facts["result"], tensors)) == ["hidden_states", "PR"]
    for _ in range(500):
        data = bytearray(message)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            received, received_tensors = messages.receive(io.BytesIO(data))
            messages.rebuild(received["result"], received_tensors)
        except (messages.BadMessage, EOFError, KeyError) as error:
            assert not isinstance(error, KeyError) or error.args == ("result",)
