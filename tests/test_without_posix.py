"""Without POSIX-only modules and functions, as on Windows, the package imports and a student runs.

Simulated: other packages need POSIX here, so they are imported first; ours are imported after the
modules and names have been removed.
"""

import json

import soundfile

from .conftest import make_sound, run_python

CODE = """
import importlib, json, os, pkgutil, signal, sys

from s3prl_ekd import compat

compat.apply()
import numpy, pandas, safetensors.torch, soundfile, tensorboardX, torch, tqdm, yaml
import s3prl.run_downstream, s3prl.upstream.distiller.model

for name in [name for name in sys.modules if name.partition(".")[0] == "s3prl_ekd"]:
    del sys.modules[name]
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None
for module, names in (
    (os, "fork forkpty getuid geteuid getgid getegid getpgid getpgrp killpg setsid sync mkfifo "
         "uname O_NOFOLLOW O_DIRECTORY O_CLOEXEC O_NONBLOCK O_SYNC pread pwrite statvfs chown "
         "lchown sched_getaffinity register_at_fork getloadavg sysconf nice getpriority sendfile "
         "posix_fadvise WIFSIGNALED WEXITSTATUS WTERMSIG waitid"),
    (signal, "SIGKILL SIGUSR1 SIGUSR2 SIGHUP SIGALRM SIGCHLD SIGPIPE SIGQUIT SIGTSTP SIGCONT "
             "SIGSTOP pthread_sigmask siginterrupt setitimer alarm sigwait"),
):
    for name in names.split():
        vars(module).pop(name, None)

import s3prl_ekd

student, audio, out = sys.argv[1:]
frames = s3prl_ekd.load_student(student).student(torch.zeros(1, 4000), torch.tensor([4000]))
from s3prl_ekd.cli import main

code = main(["features", student, audio, "-o", out])
failed = {}
for module in pkgutil.walk_packages(s3prl_ekd.__path__, "s3prl_ekd."):
    try:
        importlib.import_module(module.name)
    except Exception as error:
        failed[module.name] = repr(error)
print(json.dumps([code, os.path.getsize(out) > 0, failed]))
"""


def test_all_modules_import_and_a_student_runs(tmp_path, student_file):
    soundfile.write(tmp_path / "a.wav", make_sound(0.5), 16000)
    argv = (student_file, tmp_path / "a.wav", tmp_path / "out.safetensors")
    code, written, failed = json.loads(run_python(CODE, *map(str, argv)))
    assert code == 0 and written
    assert not failed
