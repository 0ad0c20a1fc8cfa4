"""A stand-in for kubectl and its clusters on one machine: pods are processes here, started from the objects themselves.

Every context of the kubeconfig is a folder; `current` names the one that kubectl takes unless told otherwise. What is
written down in `asked` are the words of every call. A file `pending` keeps pods of a Job from starting, `failed` has
their status, `create-fails` what is said once a Job was created, `keeps` lets nothing be deleted, and `deaf-N` lets
nobody into the pod of that index.
"""

import sys
from pathlib import Path

__all__ = ["write_kubectl"]

_KUBECTL = """\
import json, os, subprocess, sys, time, yaml
from pathlib import Path
home, words = Path(__file__).parent, sys.argv[1:]
with (home / "asked").open("a") as file:
    file.write(" ".join(words) + "\\n")
if words[:2] == ["config", "current-context"]:
    print((home / "current").read_text())
    sys.exit()
context, namespace = (home / "current").read_text(), "default"
while words[0].startswith("--"):
    if words[0] == "--context":
        context = words[1]
    namespace = words[1] if words[0] == "--namespace" else namespace
    words = words[2:]
if not (home / context).is_dir():
    sys.exit(f'error: context "{context}" does not exist')
place = home / context / namespace
place.mkdir(exist_ok=True)

def pods(name):
    return sorted(place.glob(f"{name}-node-0-*.pod"))

def option(name, short="="):
    found = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    found += [words[words.index(f"--{name}") + 1]] if f"--{name}" in words else []
    return found[0] if found else None

if words[:3] == ["create", "secret", "generic"]:
    (place / f"secret-{words[3]}").write_text(sys.stdin.read())
elif words[0] == "create" and (job := sys.stdin.read()).startswith("{"):
    whole = json.loads(job)
    (place / f"job-{whole['metadata']['name']}").write_text(job)
    if (home / "create-fails").exists():
        sys.exit((home / "create-fails").read_text())
elif words[0] == "create":
    config, whole = yaml.safe_load_all(job)
    name = whole["metadata"]["name"]
    (place / f"configmap-{name}").write_text(json.dumps(config))
    (place / f"{whole['kind'].lower()}-{name}").write_text(json.dumps(whole))
    subprocess.Popen([sys.executable, home / "controller", place, name], stdin=subprocess.DEVNULL,
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
elif words[:2] == ["get", "pods"] and option("selector").startswith("job-name="):
    job = place / f"job-{option('selector').partition('=')[2]}"
    count = json.loads(job.read_text())["spec"]["parallelism"] if job.exists() else 0
    status = {"phase": "Running"}
    if (home / "pending").exists():
        waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
        status = {"phase": "Pending", "containerStatuses": [{"state": {"waiting": waiting}}]}
    if (home / "failed").exists():
        status = json.loads((home / "failed").read_text())
    print(json.dumps({"items": [{"metadata": {"name": f"{job.name}-{index}"}, "spec": {"nodeName": f"gpu{index}"},
                                 "status": status} for index in range(count)]}))
elif words[0] == "exec":
    if (home / f"deaf-{words[2].rpartition('-')[2]}").exists():
        sys.exit("error: unable to upgrade connection: container not found")
    os.execv(sys.executable, [sys.executable, *words[words.index("--") + 2:]])
elif words[:2] == ["get", "pods"]:
    name = option("selector").partition("=")[2]
    print(json.dumps({"items": [json.loads(path.read_text()) for path in pods(name)]}))
elif words[0] == "get":
    path = place / f"{words[1]}-{words[2]}"
    if path.exists():
        print(json.dumps({"status": json.loads((place / f"status-{words[2]}").read_text())}))
elif words[0] == "logs":
    since = option("since")
    first_s = time.time() - float(since.rstrip("s")) if since else 0.0
    for path in pods(option("selector").partition("=")[2]):
        log = path.with_suffix(".log")
        for line in log.read_text().splitlines() if log.exists() else ():
            at, _, text = line.partition(" ")
            if float(at) >= first_s:
                whole, part = at.split(".")
                stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(int(whole)))
                print(f"[pod/{path.stem}/node] {stamp}.{part}Z {text}")
elif words[0] == "delete" and (home / "keeps").exists():
    sys.exit("error: the server is gone")
elif words[0] == "delete":
    for word in words[1:]:
        kind, _, name = word.partition("/")
        path = place / f"{kind}-{name}"
        if name and path.exists():
            path.unlink()
            print(f"{kind}/{name}" if option("output") == "name" else f"{kind} \\"{name}\\" deleted")
            if kind in ("jobset", "trainjob"):
                (place / f"deleted-{name}").touch()
"""
_CONTROLLER = """\
import json, os, socket, subprocess, sys, time
from pathlib import Path
from threading import Thread
from meshwright.clusters.network import interfaces
place, name = Path(sys.argv[1]), sys.argv[2]

def status(**fields):
    part = place / f".status-{name}"
    part.write_text(json.dumps(fields))
    part.rename(place / f"status-{name}")

status()
data = json.loads((place / f"configmap-{name}").read_text())["data"]
plan = json.loads(data["plan"])
address = next(each for each in interfaces().values() if not each.startswith("127."))
with socket.create_server((address, 0)) as free:
    plan["meeting"].update(host=address, port=free.getsockname()[1])
key = (place / f"secret-{name}-key").read_text()
started = []

def pump(process, path):
    with path.open("a") as file:
        for line in process.stdout:
            file.write(f"{time.time():.6f} {line}")
            file.flush()

for node in plan["nodes"]:
    pod = f"{name}-node-0-{node['index']}-x7k2p"
    plan["run_dir"] = str(place / f"{pod}.disk")
    told = {"MESHWRIGHT_PLAN": json.dumps(plan), "MESHWRIGHT_FILES": data["files"], "MESHWRIGHT_KEY": key,
            "JOB_COMPLETION_INDEX": str(node["index"]), "TOKEN": "tok-123"}
    told_of = {"metadata": {"name": pod}, "spec": {"nodeName": f"gpu{node['index']}"}}
    (place / f"{pod}.pod").write_text(json.dumps(told_of))
    process = subprocess.Popen(node["agent"], env={**os.environ, **told}, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True)
    Thread(target=pump, args=(process, place / f"{pod}.log"), daemon=True).start()
    started.append(process)
status(replicatedJobsStatus=[{"name": "node", "active": 1, "ready": 1}])
while any(each.poll() is None for each in started):
    failed = any(each.poll() for each in started)
    if failed or (place / f"deleted-{name}").exists():
        for each in started:
            if each.poll() is None:
                each.terminate()
        for each in started:
            each.wait()
    time.sleep(0.1)
time.sleep(0.5)  # their last words are written
if any(each.returncode for each in started):
    status(conditions=[{"type": "Failed", "status": "True", "message": "jobset failed"}])
else:
    status(conditions=[{"type": "Completed", "status": "True", "message": "jobset completed successfully"}])
"""


def write_kubectl(folder: Path, *contexts: str) -> Path:
    """Writes it into a folder that is to be put on PATH; the first context is the current one."""
    folder.mkdir()
    for context in contexts:
        (folder / context).mkdir(parents=True)
    (folder / "current").write_text(contexts[0])
    (folder / "kubectl").write_text(f"#!{sys.executable}\n{_KUBECTL}")
    (folder / "kubectl").chmod(0o755)
    (folder / "controller").write_text(_CONTROLLER)
    return folder
