"""Stand-ins for Slurm's commands on one machine, so that what lies between them is tested without a cluster.

`sbatch` runs its script in the background, `srun` runs one task per node, `scontrol requeue` lets the script run again.
Real Slurm is tested in tests/lab.
"""

import sys
from pathlib import Path

__all__ = ["write_commands"]

_SBATCH = """\
import os, subprocess, sys
script = sys.stdin.read()
if "--test-only" in sys.argv:
    sys.exit(0)
words = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:])
nodes = ",".join(f"n{index}" for index in range(int(words["nodes"])))
home = os.path.dirname(__file__)
open(f"{home}/script", "w").write(script)
runner = os.path.join(home, "runner")
log = open(words["output"].replace("%%", "%"), "a")
child = subprocess.Popen([sys.executable, runner, home, nodes], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                         start_new_session=True)
open(f"{home}/pid", "w").write(str(child.pid))
print("42;cluster")
"""
_RUNNER = """\
import os, signal, subprocess, sys
home, nodes = sys.argv[1:]
for times in range(5):
    env = {**os.environ, "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": nodes, "SLURM_RESTART_COUNT": str(times)}
    child = subprocess.Popen(["/bin/sh", f"{home}/script"], env=env, start_new_session=True)
    open(f"{home}/batch", "w").write(str(child.pid))
    child.wait()
    if not os.path.exists(f"{home}/requeue"):
        break
    os.unlink(f"{home}/requeue")
"""
_SRUN = """\
import os, signal, subprocess, sys
words = [word for word in sys.argv[1:] if not word.startswith("--") or "=" not in word]
tasks = int(next(word for word in sys.argv if word.startswith("--ntasks=")).partition("=")[2])
started = [subprocess.Popen(words, env={**os.environ, "SLURM_NODEID": str(index)}) for index in range(tasks)]
def end(number, frame):
    for each in started:
        each.send_signal(number)
signal.signal(signal.SIGTERM, end)
sys.exit(max(abs(each.wait()) for each in started))
"""
_SCONTROL = """\
import os, signal, sys
home = os.path.dirname(__file__)
if sys.argv[1] == "requeue":
    open(f"{home}/requeue", "w").close()
    os.kill(int(open(f"{home}/batch").read()), signal.SIGTERM)
else:
    print("\\n".join(sys.argv[-1].split(",")))
"""
_SQUEUE = """\
import os
pid = open(os.path.join(os.path.dirname(__file__), "pid")).read()
try:
    alive = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
except OSError:
    alive = False
print("RUNNING|None" if alive else "COMPLETED|None")
"""
_SCANCEL = """\
import os, signal
os.kill(int(open(os.path.join(os.path.dirname(__file__), "batch")).read()), signal.SIGTERM)
"""


def write_commands(folder: Path) -> None:
    """Writes them into a folder that is to be put on PATH."""
    folder.mkdir()
    names = {"sbatch": _SBATCH, "srun": _SRUN, "scontrol": _SCONTROL, "squeue": _SQUEUE, "scancel": _SCANCEL}
    for name, text in names.items():
        path = folder / name
        path.write_text(f"#!{sys.executable} -IS\n{text}")
        path.chmod(0o755)
    (folder / "runner").write_text(_RUNNER)
