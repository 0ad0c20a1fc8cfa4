"""Stand-ins for Slurm's commands on one machine, so that what lies between them is tested without a cluster.

`sbatch` runs its script in the background, `srun` runs one task per node, `scontrol requeue` lets the script run again,
`salloc` holds nodes for a command. A file `env-NODE` has variables of what `srun` starts on one node alone.
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
home = os.path.dirname(__file__)
open(f"{home}/script", "w").write(script)
runner = os.path.join(home, "runner")
log = open(words["output"].replace("%%", "%"), "a")
child = subprocess.Popen([sys.executable, runner, home, words["nodes"], words.get("array", "")],
                         stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
open(f"{home}/pid", "w").write(str(child.pid))
print("42;cluster")
"""
_RUNNER = """\
import os, re, signal, subprocess, sys, time
home, wanted, array = sys.argv[1:]
def given():
    names = [f"n{index}" for index in range(int(wanted.rpartition("-")[2]))]
    told = open(f"{home}/updated").read() if os.path.exists(f"{home}/updated") else ""
    if "-" in wanted:  # of a fixed number, n1 is n1 again
        names = [name for name in names if name not in told.strip().rpartition("=")[2].split(",")]
    return ",".join(names)
def set_state(task, state):
    open(f"{home}/.part", "w").write(state)
    os.rename(f"{home}/.part", f"{home}/state{task}")
def start(task, times):
    env = {**os.environ, "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": given(), "SLURM_RESTART_COUNT": str(times)}
    if task:
        env |= {"SLURM_JOB_ID": str(43 + int(task[1:])), "SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": task[1:]}
    open(f"{home}/times", "w").write(str(times))
    child = subprocess.Popen(["/bin/sh", f"{home}/script"], env=env, start_new_session=True)
    open(f"{home}/batch{task}", "w").write(str(child.pid))
    set_state(task, "RUNNING")
    return child
last, most = re.fullmatch("0-([0-9]+)%([0-9]+)", array).groups() if array else (0, 1)
waiting = [f"_{number}" for number in range(int(last) + 1)] if array else [""]
for task in waiting:
    set_state(task, "PENDING")
running = {}
while waiting or running:
    while waiting and len(running) < int(most):
        task = waiting.pop(0)
        if open(f"{home}/state{task}").read() == "PENDING":
            running[task] = (start(task, 0), 0)
    for task, (child, times) in list(running.items()):
        if child.poll() is None:
            continue
        if os.path.exists(f"{home}/requeue{task}"):
            os.unlink(f"{home}/requeue{task}")
            running[task] = (start(task, times + 1), times + 1)
        else:
            del running[task]
            set_state(task, "COMPLETED" if child.returncode == 0 else "FAILED")
    time.sleep(0.02)
"""
_SRUN = """\
import json, os, signal, subprocess, sys
words = [word for word in sys.argv[1:] if word != "--overlap" and (not word.startswith("--") or "=" not in word)]
told = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
own = os.path.join(os.path.dirname(__file__), f"env-{told.get('nodelist')}")
env = {**os.environ, **(json.load(open(own)) if os.path.exists(own) else {})}
tasks = int(told["ntasks"])
started = [subprocess.Popen(words, env={**env, "SLURM_NODEID": str(index)}) for index in range(tasks)]
def end(number, frame):
    for each in started:
        each.send_signal(number)
signal.signal(signal.SIGTERM, end)
open(os.path.join(os.path.dirname(__file__), "step"), "w").write(str(os.getpid()))
sys.exit(max(abs(each.wait()) for each in started))
"""
_SCONTROL = """\
import os, signal, sys
home = os.path.dirname(__file__)
if os.path.exists(f"{home}/cut-off") and sys.argv[1:3] != ["show", "hostnames"]:
    sys.exit("Unable to contact slurm controller (connect failure)")
if sys.argv[1] == "requeue":
    task = "" if sys.argv[2] == "42" else f"_{int(sys.argv[2]) - 43}"
    open(f"{home}/requeue{task}", "w").close()
    os.kill(int(open(f"{home}/batch{task}").read()), signal.SIGTERM)
elif sys.argv[1:3] == ["show", "job"]:
    times = int(open(f"{home}/times").read()) + os.path.exists(f"{home}/requeue")
    state = "COMPLETING" if os.path.exists(f"{home}/requeue") else "RUNNING"
    preempted = "2026-11-27T20:20:33" if os.path.exists(f"{home}/preempt") else "None"
    print(f"JobId={sys.argv[3]} JobName=j\\n   JobState={state} Reason=None")
    print(f"   Requeue=1 Restarts={times} BatchFlag=1")
    print(f"   PreemptEligibleTime=2026-11-27T20:20:31 PreemptTime={preempted}")
elif sys.argv[1:3] == ["show", "config"]:
    print("KillOnBadExit = 0\\nKillWait                = 20 sec")
elif sys.argv[1] == "ping":
    print("Slurmctld(primary) at here is UP")
elif sys.argv[1] == "update":
    open(f"{home}/updated", "a").write(" ".join(sys.argv[2:]) + "\\n")
else:
    print("\\n".join(sys.argv[-1].split(",")))
"""
_SQUEUE = """\
import glob, os, sys
job = next(word for word in sys.argv if word.startswith("--jobs=")).partition("=")[2]
for path in sorted(glob.glob(os.path.join(os.path.dirname(__file__), f"state{job[2:] or '*'}"))):
    state = open(path).read()
    if state == "FORGOTTEN":  # as Slurm does with tasks that never began
        continue
    print(f"{state}|{'JobArrayTaskLimit' if state == 'PENDING' else 'None'}")
"""
_SALLOC = """\
import os, signal, subprocess, sys, time
home = os.path.dirname(__file__)
open(f"{home}/asked", "w").write("\\n".join(sys.argv))
told = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
if int(told["nodes"]) > 3:
    sys.exit("salloc: error: Job submit/allocate failed: Node count specification invalid")
print("salloc: Pending job allocation 7", file=sys.stderr, flush=True)
signal.signal(signal.SIGTERM, lambda *_: (open(f"{home}/revoked", "w"), os._exit(1)))
while os.path.exists(f"{home}/busy"):
    time.sleep(0.02)
names = [f"n{index}" for index in range(4) if f"n{index}" not in told.get("exclude", "").split(",")]
given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": ",".join(names[:int(told["nodes"])])}
subprocess.call([word for word in sys.argv[1:] if not word.startswith("--")], env={**os.environ, **given})
open(f"{home}/given-back", "w")
"""
_SCANCEL = """\
import glob, os, signal, sys
home = os.path.dirname(__file__)
for path in glob.glob(f"{home}/state{sys.argv[1][2:] or '*'}"):
    if open(path).read() == "PENDING":
        open(path, "w").write("FORGOTTEN")
    elif open(path).read() == "RUNNING":
        os.kill(int(open(path.replace("state", "batch")).read()), signal.SIGTERM)
"""


def write_commands(folder: Path) -> None:
    """Writes them into a folder that is to be put on PATH."""
    folder.mkdir()
    names = {"sbatch": _SBATCH, "srun": _SRUN, "scontrol": _SCONTROL, "squeue": _SQUEUE, "scancel": _SCANCEL}
    names["salloc"] = _SALLOC
    for name, text in names.items():
        path = folder / name
        path.write_text(f"#!{sys.executable} -IS\n{text}")
        path.chmod(0o755)
    (folder / "runner").write_text(_RUNNER)
