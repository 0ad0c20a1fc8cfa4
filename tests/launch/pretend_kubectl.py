"""A stand-in for kubectl and its clusters on one machine: pods are processes here, started from the objects themselves.

Every context of the kubeconfig is a folder; `current` names the one that kubectl takes unless told otherwise. What is
written down in `asked` are the words of every call. A file `pending` keeps pods of a Job from starting, `failed` has
their status, `same` puts all on one node, `create-fails` is what is said once a Job was created, `keeps` lets nothing
be deleted, `signals` is the number of the signal that whoever deletes something gets while it waits for that, `stays`
is what is said where its pods are waited for, and `deaf-N` lets nobody into a pod on node N. Pods of a Job that nobody
waited for hold their nodes for a grace; folders of namespaces have what `pretend_jobset` heeds.
"""

import sys
from pathlib import Path

__all__ = ["write_kubectl"]

_KUBECTL = """\
import json, os, subprocess, sys, time
from pathlib import Path
home, words = Path(__file__).parent, sys.argv[1:]
sys.path.append(TESTS)
import pretend_jobset
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
    import yaml
    config, whole = yaml.safe_load_all(job)
    (place / "busy").unlink(missing_ok=True)
    name = whole["metadata"]["name"]
    (place / f"configmap-{name}").write_text(json.dumps(config))
    (place / f"{whole['kind'].lower()}-{name}").write_text(json.dumps(whole))
    subprocess.Popen([sys.executable, pretend_jobset.__file__, place, name], stdin=subprocess.DEVNULL,
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
elif words[:2] == ["get", "pods"] and option("selector").startswith("job-name="):
    job = place / f"job-{option('selector').partition('=')[2]}"
    spec = json.loads(job.read_text())["spec"] if job.exists() else {"parallelism": 0}
    count, status, taken = spec["parallelism"], {"phase": "Running"}, []
    if (home / "pending").exists():
        waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
        status = {"phase": "Pending", "containerStatuses": [{"state": {"waiting": waiting}}]}
    if (home / "failed").exists():
        status = json.loads((home / "failed").read_text())
    full = {"phase": "Pending", "conditions": [{"status": "False", "message": "0/2 nodes are available"}]}
    items, one = [], (home / "same").exists()
    for index in range(count):
        node = "gpu0" if one else pretend_jobset.free_node(place, spec["template"]["spec"], taken, count)
        taken.append(node)
        items.append({"metadata": {"name": f"{job.name}-{index}-{index if one else node}"},
                      "spec": {"nodeName": node} if node else {}, "status": status if node else full})
    (place / f"on-{job.name}").write_text(" ".join(filter(None, taken)))
    print(json.dumps({"items": items}))
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
    if (home / "signals").exists():
        os.kill(os.getppid(), int((home / "signals").read_text()))
        time.sleep(0.5)  # until whoever does not wait for the end has killed us
    for word in words[1:]:
        kind, _, name = word.partition("/")
        path = place / f"{kind}-{name}"
        if name and path.exists():
            on = place / f"on-{path.name}"
            if on.exists() and not (option("wait") == "true" and option("cascade") == "foreground"):
                grace_s = json.loads(path.read_text())["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
                pretend_jobset.going(place, *on.read_text().split(), grace_s=grace_s)
            path.unlink()
            if (home / "stays").exists() and option("wait") == "true":
                sys.exit((home / "stays").read_text())
            print(f"{kind}/{name}" if option("output") == "name" else f"{kind} \\"{name}\\" deleted")
            if kind in ("jobset", "trainjob"):
                (place / f"deleted-{name}").touch()
"""


def write_kubectl(folder: Path, *contexts: str) -> Path:
    """Writes it into a folder that is to be put on PATH; the first context is the current one."""
    folder.mkdir()
    for context in contexts:
        (folder / context).mkdir(parents=True)
    (folder / "current").write_text(contexts[0])
    tests = str(Path(__file__).parent)
    (folder / "kubectl").write_text(f"#!{sys.executable}\nTESTS = {tests!r}\n{_KUBECTL}")
    (folder / "kubectl").chmod(0o755)
    return folder
