"""Check this folder, and submit it to SUPERB's hidden set.

validate  make the organisers' checks of the files and the model; needs only torch
upload    validate, commit the files and push them to this folder's git remote
info      print the address and the commit that the submission form asks for

example:
  python cli.py validate
  python cli.py upload "my first model"
  python cli.py info
"""

import argparse
import importlib
import re
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ("expert.py", "model.pt", "requirements.txt", "README.md", "LICENSE", "cli.py")
TASKS = ("PR", "SID", "ER", "ASR", "ASV", "SD", "QbE", "ST", "SS", "SE", "secret")
RATE, SECONDS = 16000, (2, 1.8, 3.7)
MAX_SHIFT = 5  # frames, between the number expected and the number returned
LFS_BYTES = 10 << 20  # the Hugging Face Hub refuses larger files outside of git LFS


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("validate", help="make the organisers' checks")
    parse_upload = commands.add_parser("upload", help="validate, commit and push")
    parse_upload.add_argument("message", metavar="MESSAGE", help="of the commit")
    commands.add_parser("info", help="print address and commit")
    args = parser.parse_args()
    if args.command == "info":
        info()
        return
    validate()
    if args.command == "upload":
        upload(args.message)
        info()


def validate():
    """Make the organisers' checks; exit at the first that fails."""
    missing = [name for name in FILES if not (HERE / name).is_file()]
    if missing:
        fail("the folder lacks " + ", ".join(missing))
    print("files: " + ", ".join(FILES))

    # of torch, where numpy is not installed
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch

    sys.path.insert(0, str(HERE))
    expert = attempt(importlib.import_module, "expert")
    if not hasattr(expert, "UpstreamExpert"):
        fail("expert.py has no class UpstreamExpert")
    model = attempt(expert.UpstreamExpert, ckpt=str(HERE / "model.pt"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {parameters:,} parameters")

    waves = [torch.rand(int(seconds * RATE)) for seconds in SECONDS]
    with torch.no_grad():
        results = attempt(model, waves)
    if not isinstance(results, dict):
        fail("the model must return a dict, got " + type(results).__name__)
    for task in TASKS:
        check_task(model, task, results.get(task, results.get("hidden_states")), waves)
    states = results.get("hidden_states") or ()
    shape = f"{len(states)} of {[*states[0].shape]}" if states else "for each task"
    print(f"hidden states: {shape}, for waveforms of {', '.join(map(str, SECONDS))} s")
    print("all checks passed")


def attempt(function, *args, **kwargs):
    """Call a function of this folder's code; exit with one line if it fails."""
    try:
        return function(*args, **kwargs)
    except Exception as error:  # it may raise anything
        lines = traceback.extract_tb(error.__traceback__)[1:]
        places = [(Path(line.filename), line.lineno) for line in lines]
        own = [f" in {path.name} line {number}" for path, number in places if HERE in path.parents]
        where = own[-1] if own else ""
        fail(f"{type(error).__name__}{where}: {' '.join(str(error).split())}")


def check_task(model, task, states, waves):
    """Check what a task is given: a list of tensors [batch, frame, dim], and their rate."""
    import torch

    if states is None:
        fail(f"{task}: the result has neither this key nor hidden_states")
    if not isinstance(states, list) or not states:
        kind = "an empty list" if states == [] else type(states).__name__
        fail(f"{task}: the hidden states must be a list of tensors, got {kind}")
    for state in states:
        if not isinstance(state, torch.Tensor) or state.dim() != 3:
            got = [*state.shape] if isinstance(state, torch.Tensor) else type(state).__name__
            fail(f"{task}: expected tensors [batch, frame, dim], got {got}")
    shapes = sorted({tuple(state.shape) for state in states})
    if len(shapes) > 1:
        fail(f"{task}: the tensors differ in shape: {shapes}")
    rate = attempt(model.get_downsample_rates, task)
    if not isinstance(rate, int) or rate < 1:
        fail(f"{task}: get_downsample_rates must return a whole number above 0, got {rate!r}")
    expected, frames = round(max(map(len, waves)) / rate), shapes[0][1]
    if abs(expected - frames) >= MAX_SHIFT:
        fail(f"{task}: expected about {expected} frames, got {frames}")


def upload(message):
    """Commit the files and push them."""
    repository()
    attributes = git("check-attr", "filter", "--", "model.pt").stdout
    if (HERE / "model.pt").stat().st_size > LFS_BYTES and not attributes.strip().endswith("lfs"):
        fail("model.pt needs git LFS; type: git lfs install && git lfs track '*.pt'")
    files = [*FILES, *(name for name in (".gitattributes",) if (HERE / name).exists())]
    run_git("add", "--", *files)
    if git("diff", "--cached", "--quiet", "--", *files).returncode:
        run_git("commit", "-m", message, "--", *files)
    else:
        print("no file has changed since the last commit")
    run_git("push", "-u", remote(), "HEAD")


def info():
    """Print what the submission form asks for."""
    repository()
    commit = git("rev-parse", "HEAD")
    if commit.returncode:
        fail('nothing is committed yet; type: python cli.py upload "MESSAGE"')
    changed = git("status", "--porcelain", "--", *FILES).stdout
    if changed or git("rev-parse", "@{upstream}").stdout != commit.stdout:
        fail('not all is uploaded; type: python cli.py upload "MESSAGE"')
    # an address may have a name and a token in front of the host
    address = re.sub("(?<=://)[^/]*@", "", git("remote", "get-url", remote()).stdout.strip())
    print("address: " + address)
    print("commit:  " + commit.stdout.strip())


def repository():
    """Exit unless this folder is the top of a git repository with a remote."""
    top = git("rev-parse", "--show-toplevel")
    if top.returncode or Path(top.stdout.strip()).resolve() != HERE or not remote():
        fail(
            f"{HERE} is not a clone of a repository; make one on the Hugging Face Hub, clone it, "
            "copy these files into the clone, and type the command there"
        )


def remote():
    """The name of the first remote, usually origin."""
    names = git("remote").stdout.split()
    return "origin" if "origin" in names else "".join(names[:1])


def git(*argv):
    """Run git in this folder and return the process with what it printed."""
    try:
        return subprocess.run(["git", "-C", str(HERE), *argv], capture_output=True, text=True)
    except FileNotFoundError:
        fail("git is not installed")


def run_git(*argv):
    """Run git in this folder, with its output and questions on the terminal."""
    if subprocess.call(["git", "-C", str(HERE), *argv]):
        fail(f"git {argv[0]} failed")


def fail(reason):
    sys.exit("error: " + reason)


if __name__ == "__main__":
    main()
