"""`s3prl-ekd validate` and packages that mean harm: every verdict is made of their outputs, outside
of their process, and nothing of theirs is left when it is over."""

import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s3prl_ekd.distill.settings import StudentSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.export.hidden_set import messages
from s3prl_ekd.export.hidden_set import sandbox as process
from s3prl_ekd.export.hidden_set.package import package_contents, write_package
from s3prl_ekd.student_file import LoadedStudent

from .conftest import STUDENT

FIRST = ("weights", "import", "build", "forward", "lists")


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("honest")
    student = Student(StudentSettings(**STUDENT)).eval()
    write_package(package_contents(LoadedStudent(student, None, {}, {}), False), "a card", folder)
    for name in ("LICENSE", "README.md"):
        (folder / name).touch()
    return folder


@pytest.fixture
def hostile(honest, tmp_path):
    """Writes a package with code at the top of its expert.py, and in its forward."""

    def write(top: str = "", forward: str = "return out") -> Path:
        folder = tmp_path / "package"
        shutil.copytree(honest, folder)
        source = (folder / "expert.py").read_text()
        body = f"        out = _Good.forward(self, wavs)\n        {forward}\n"
        spoilt = "_Good = UpstreamExpert\n\n\nclass UpstreamExpert(_Good):\n"
        source += f"\n\n{top}\n\n\n{spoilt}    def forward(self, wavs):\n{body}"
        (folder / "expert.py").write_text(source)
        return folder

    return write


def has_namespaces() -> bool:
    """Whether this system lets a process leave the network."""
    code = "from s3prl_ekd.export.hidden_set.isolation import leave_network; print(leave_network())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout == "True\n"


def outcomes(folder, names=FIRST, limit=100.0):
    found, _ = process.validate(folder, {"short": [16_000]}, limit, names=names)
    return {outcome.name: outcome for outcome in found}


ATTACK = """
import ctypes, os, socket, subprocess, sys, time

NOTES = {notes!r}


def note(name, text):
    with open(os.path.join(NOTES, name), "w") as file:
        file.write(text)


def attempt(what):
    try:
        what()
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


def test_what_it_reads_sends_and_leaves(hostile, tmp_path, monkeypatch):
    """No token, no file of ours named to it, no datagram, no process, and no pipe that is full."""
    notes = tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setenv("HF_TOKEN", "a-secret-token")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    offline = has_namespaces()
    with socket.socket(type=socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.setblocking(False)
        port = listener.getsockname()[1]
        # Code that Python does not follow is held back where the system has namespaces.
        program = "subprocess.run([sys.executable, '-c', SEND])" if offline else ""
        top = ATTACK.format(notes=str(notes), port=port, program=program)
        found = outcomes(hostile(top), (*FIRST, "network"))
        with pytest.raises(BlockingIOError):
            listener.recv(10)
    assert [found[name].status for name in FIRST] == ["pass"] * len(FIRST)
    assert found["network"].status == "fail" and "127.0.0.1" in found["network"].reason
    environment = (notes / "environment").read_text()
    assert "'OMP_NUM_THREADS': '1'" in environment and "a-secret-token" not in environment
    if offline and (notes / "parent").exists():
        assert "a-secret-token" not in (notes / "parent").read_text()
    assert not (notes / "written").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((notes / "daemon").read_text()), 0)


FORGE = """
import json, os

answer = json.dumps({"facts": {"type": "dict", "module": True, "keys": []}, "tensors": []}).encode()
message = len(answer).to_bytes(8, "little") + bytes(8) + answer
for number in range(64):
    try:
        os.write(number, message)
    except OSError:
        pass
"""


def test_forged_answers_are_no_verdicts(hostile):
    """What it writes into the pipes is read as outputs, which are then wrong or missing."""
    found = outcomes(hostile(FORGE), (*FIRST, "values"))
    assert found["values"].status != "pass" and found["forward"].status != "pass"
    assert "fail" in {outcome.status for outcome in found.values()}


ENDS = {  # what forward does -> what the reason names
    "__import__('os')._exit(0)": "exit code 0",
    "__import__('os').closerange(0, 64)": "",
    "raise SystemExit(0)": "SystemExit",
    "return {'hidden_states': [torch.zeros(1).expand(1, 1 << 15, 1 << 15)]}": "268,435,456",
}


@pytest.mark.parametrize("line", ENDS)
def test_an_end_in_the_middle_is_a_failure(hostile, line):
    found = outcomes(hostile(forward=line))
    assert found["forward"].status == "fail" and ENDS[line] in found["forward"].reason
    assert found["lists"].status == "skip"


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


def test_objects_come_as_plain_data(hostile, tmp_path):
    """A subclass's numbers, and of other objects the name of their type, printable and short."""
    top = OBJECTS.format(path=str(tmp_path / "ran"))
    line = "return {**out, 'hidden_states': [s.as_subclass(Sub) for s in out['hidden_states']], "
    line += "'PR': Code()}"
    found = outcomes(hostile(top, line))
    assert found["forward"].status == "pass" and found["lists"].status == "fail"
    assert found["lists"].reason.startswith("PR is a ?[2Jxx") and len(found["lists"].reason) < 600
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_files_that_cannot_be_read_as_code(hostile):
    """A named pipe would be waited for; nesting is more than Python's own parser bears."""
    folder = hostile()
    os.mkfifo(folder / "pipe.py")
    found = outcomes(folder, ())
    assert found["syntax"].status == "fail" and "pipe.py" in found["syntax"].reason
    (folder / "pipe.py").unlink()
    (folder / "deep.py").write_text("x = " + "-" * 50_000 + "1\n")
    assert outcomes(folder, ())["syntax"].status == "fail"
    (folder / "deep.py").write_text("#" * 20_000_000)
    assert outcomes(folder, ())["syntax"].status == "fail"


TENSORS = [torch.randn(2, 3), torch.tensor(7), torch.tensor([True, False]), torch.empty(0, 4)]


def test_messages_come_through():
    file = io.BytesIO()
    described = [torch.randn(3).half(), TENSORS[0][:, ::2], *TENSORS]
    messages.send(file, {"a": [1, None, "ü"]}, described)
    file.seek(0)
    facts, tensors = messages.receive(file)
    assert facts == {"a": [1, None, "ü"]}
    for one, other in zip(described, tensors, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def _message(head: bytes, body: bytes = b"") -> bytes:
    return len(head).to_bytes(8, "little") + len(body).to_bytes(8, "little") + head + body


def _tensors(*layouts, facts=None, body=b"") -> bytes:
    return _message(json.dumps({"facts": facts or {}, "tensors": layouts}).encode(), body)


BAD = {
    "a huge head": (1 << 62).to_bytes(8, "little") + bytes(8),
    "a huge body": bytes(8) + (1 << 62).to_bytes(8, "little"),
    "no JSON": _message(b"{"),
    "deep JSON": _message(b"[" * 100_000),
    "a list": _message(b"[]"),
    "a long number": _message(b"9" * 10_000),
    "facts that are none": _tensors(facts=["a"]),
    "no such type": _tensors(["object", [1]], body=bytes(8)),
    "a negative size": _tensors(["float32", [-1, -1]], body=bytes(4)),
    "a size that is true": _tensors(["uint8", [True]], body=bytes(1)),
    "too few numbers": _tensors(["float32", [2]], body=bytes(4)),
    "too many numbers": _tensors(["float32", [2]], body=bytes(12)),
    "a product that is huge": _tensors(["uint8", [1 << 28, 1 << 28]]),
    "many dimensions": _tensors(["uint8", [1] * 100_000], body=bytes(1)),
    "a truth value of 2": _tensors(["bool", [1]], body=b"\2"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_message_is_refused(name):
    with pytest.raises(messages.BadMessage):
        messages.receive(io.BytesIO(BAD[name]))


def test_damaged_messages_are_refused_or_read():
    file = io.BytesIO()
    tensors: list[torch.Tensor] = []
    result = {"hidden_states": [*TENSORS], "PR": (TENSORS[0], {"a": object()})}
    facts = {"result": messages.describe(result, tensors)}
    messages.send(file, facts, tensors)
    whole, draw = file.getvalue(), random.Random(0)
    assert list(messages.rebuild(facts["result"], tensors, {})) == ["hidden_states", "PR"]
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(16, len(data))] = draw.randrange(256)
        try:
            got, read = messages.receive(io.BytesIO(data))
            messages.rebuild(got["result"], read, {})
        except (messages.BadMessage, EOFError, KeyError) as error:
            assert not isinstance(error, KeyError) or error.args == ("result",)
