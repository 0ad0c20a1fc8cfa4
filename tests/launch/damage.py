"""Damaged inputs of the command line, by number: job files, files of clusters, overrides, options and environments."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Case", "case_of"]

_ROOT = Path(__file__).parents[2]
_CLUSTERS: dict[str, Any] = {
    "lab": {
        "type": "ssh",
        "user": "me",
        "hosts": [{"name": "h1", "addr": "10.0.0.1", "slots": 2, "env": {"A": "b"}}, {"name": "h2", "slots": 2}],
    },
    "big": {"type": "slurm", "partition": "gpu", "time": "2h", "exclude": ["n1"], "sbatch": {"mail-type": "FAIL"}},
    "pods": {"type": "kubernetes", "image": "registry.example/t:1", "claim": "runs", "node_selector": {"a": "b"}},
    "mpi": {"type": "mpi", "hostfile": "hosts.txt", "extra": ["--tag-output"]},
    "ray": {"type": "ray", "address": "10.0.0.1:6379", "cpus_per_node": 4},
    "here": {"type": "local", "simulate_nodes": 2, "gpus_per_node": 0},
}
_JOBS: list[dict[str, Any]] = [
    *(yaml.safe_load(path.read_text()) for path in sorted((_ROOT / "examples").glob("*.yaml"))),
    yaml.safe_load(Path(__file__).with_name("every_block.yaml").read_text()),
    *({"name": "j", "command": ["python", "-c", "pass"], "cluster": each} for each in _CLUSTERS.values()),
    *({"name": "j", "command": ["x", "{run_id}"], "env": {"A": "b"}, "cluster": name} for name in _CLUSTERS),
]
_KEYS = sorted({key for job in _JOBS for key in job} | {"nodes", "setup", "after", "rendezvous", "resources"})
_SCALARS: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3.5, 1e300, -1e-300, 2**31, 2**63 - 1, 2**70, float("nan"), float("inf")),
    *(
        "",
        " ",
        "two",
        "2",
        "1e9s",
        "10m",
        "-5s",
        "4MiB",
        "1e999GiB",
        "auto",
        "gpu",
        "none",
        "~nobody-there/x",
        "~",
        ".",
    ),
    *(
        "{name}",
        "{nope}",
        "{",
        "}",
        "{run_id}/{name!r:>9999999999}",
        "../../etc",
        "/dev/null",
        "/proc/self/mem",
        "a\0b",
    ),
    *(
        "a\nb",
        "\x1b[31m",
        "\u2028",
        "\ufeff",
        "é𝄞",
        "%s%n",
        "$(id)",
        "`id`",
        "'\"",
        "-x",
        "--help",
        "=",
        "\\",
        "x" * 300,
    ),
    *("9" * 400, "1" * 30 + "d", "exit:0", "exit:999999999999", "0x" + "f" * 40, "0o777", "24:00:00", "[1]", "!!int 3"),
]
_RAW = [
    *(b"", b"\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\x80", b"\r", b"\r\n", b"\t", b"\x0b", b"\x7f", b"\xc2\x85"),
    *(
        b"---\n",
        b"...\n",
        b"%YAML 9.9\n",
        b"%TAG ! !\n",
        b"? ",
        b": ",
        b"- ",
        b"[",
        b"]",
        b"{",
        b"}",
        b"&a ",
        b"*a",
        b"<<: *a\n",
    ),
    *(
        b"!!python/object/apply:os.system ['true']",
        b"!!binary aGk=",
        b"!!set {a}",
        b"!x ",
        b"!<",
        b"|",
        b">-",
        b"'",
        b'"',
    ),
    *(
        b'"\\ud800"',
        b'"\\U00110000"',
        b'"\\x00"',
        b"a: &x [*x]\n",
        b"#",
        b",",
        b"@",
        b"`",
        b".nan",
        b"1e999",
        b"~",
        b"\xed\xa0\x80",
    ),
    b"b: &b [x,x,x]\nc: &c [*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c]\ne: [*d,*d,*d,*d]\n",
]
_VARIABLES = ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "RAY_ADDRESS")
_VARIABLES += (
    "COLUMNS",
    "NO_COLOR",
    "TERM",
    "LINES",
    "PATH",
    "MESHWRIGHT_RUN_ID",
    "MESHWRIGHT_SSH_CONFIG",
    "FORCE_COLOR",
)
_WORDS = [
    "",
    "-",
    "--",
    "\udcff",
    "é",
    "x\ny",
    "/",
    "..",
    "/nowhere/job.yaml",
    "job.yaml/",
    "1" * 400,
    "-1",
    "0",
    "1e9",
    "\x1b[2J",
]
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_SOUND = yaml.safe_dump({"clusters": _CLUSTERS}).encode()
_OPTIONS = [
    "--set",
    "--dry-run",
    "--json",
    "--run-id",
    "--detach",
    "--help",
    "--nope",
    "--host",
    "--check",
    "--exclude",
    "-f",
]


@dataclass
class Case:
    """One run of the command line: its words, the files around it, and what is different in its environment."""

    words: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)


def case_of(number: int) -> Case:
    """The case of a number; always the same one."""
    draw = random.Random(number)
    make = draw.choices([_by_tree, _by_bytes, _by_override, _by_words, _by_environment], [5, 5, 4, 2, 1])[0]
    return make(draw)


def _place(draw: random.Random, root: Any) -> tuple[Any, Any]:
    """A container of a tree and one of its keys."""
    node, key = root, None
    while isinstance(node, (dict, list)) and node:
        above = node
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = above[key]
        if draw.random() < 0.25:
            break
    else:
        return (above, key) if key is not None else ({"": 0}, "")
    return above, key


def _value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.random()
    if depth > 2 or kind < 0.75:
        return draw.choice(_SCALARS)
    if kind < 0.85:
        return [_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice([*_KEYS, "", "é", "a.b"]): _value(draw, depth + 1) for _ in range(draw.randrange(4))}


def _misspelt(draw: random.Random, key: Any) -> Any:
    text, at = str(key), draw.randrange(len(str(key)) + 1)
    return draw.choice(
        [text[:at] + text[at + 1 :], text[:at] + draw.choice("xZ_-. 1é") + text[at:], text.upper(), 7, None]
    )


def _damage(draw: random.Random, root: Any) -> None:
    """One change to a tree, in place."""
    above, key = _place(draw, root)
    kind = draw.randrange(6)
    if kind == 0:
        del above[key]
    elif kind == 1 and isinstance(above, dict):
        above[_misspelt(draw, key)] = above.pop(key)
    elif kind == 2 and isinstance(above, list):
        above.extend([above[key]] * draw.choice([1, 2, 50]))
    elif kind == 3:
        above[key] = [above[key]]
    else:
        above[key] = _value(draw)


def _job(draw: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(draw.choice(_JOBS)))
    if "model" in found and "cluster" in found and draw.random() < 0.5:
        found["cluster"] = json.loads(json.dumps(draw.choice(list(_CLUSTERS.values()))))
    return found


def _written(draw: random.Random, root: Any) -> bytes:
    """A tree as a file; what YAML cannot write becomes JSON, which it can read."""
    if draw.random() < 0.5:
        text = yaml.dump(root, Dumper=_DUMPER, sort_keys=False, allow_unicode=draw.random() < 0.5)
        return text.encode(errors="surrogatepass")
    text = json.dumps(root, ensure_ascii=draw.random() < 0.5, skipkeys=True)
    return text.replace("NaN", ".nan").replace("Infinity", ".inf").encode(errors="surrogatepass")


def _words(draw: random.Random) -> list[str]:
    command = draw.choices([["launch", "--dry-run"], ["launch"], ["launch", "--detach"], ["doctor"]], [6, 3, 1, 1])[0]
    return [*command, "job.yaml", *(["--json"] if draw.random() < 0.3 else [])]


def _files(draw: random.Random, root: Any, clusters: Any = None) -> dict[str, bytes]:
    return {"job.yaml": _written(draw, root), "clusters.yaml": _written(draw, clusters) if clusters else _SOUND}


def _by_tree(draw: random.Random) -> Case:
    root, clusters = _job(draw), {"clusters": json.loads(json.dumps(_CLUSTERS))}
    named = isinstance(root.get("cluster"), str)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        _damage(draw, clusters if named and draw.random() < 0.6 else root)
    return Case(_words(draw), _files(draw, root, clusters if named else None))


def _cut(draw: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    at = draw.randrange(len(lines))
    start = draw.randrange(len(content) + 1)
    opened, coded = draw.choice([b"[", b"{a: ", b"- ", b"? "]), draw.choice(["utf-16", "latin-1", "utf-8-sig"])
    ways: list[Callable[[], bytes]] = [
        lambda: content[:start] + draw.choice(_RAW) + content[start:],
        lambda: content[:start] + draw.choice(_RAW) + content[start + draw.randrange(12) :],
        lambda: content[:start] + bytes([draw.randrange(256)]) + content[start + 1 :],
        lambda: content[:start],
        lambda: b"\n".join(lines[:at] + lines[at + 1 :]),
        lambda: b"\n".join(lines[: at + 1] + lines[at:]),
        lambda: b"\n".join([*lines[:at], b"  " * draw.randrange(4) + lines[at].strip(), *lines[at + 1 :]]),
        lambda: content.replace(b"\n", draw.choice([b"\r\n", b"\r", b"\n\n", b"\xe2\x80\xa8"])),
        lambda: draw.choice(_RAW) + content,
        lambda: content + draw.choice(_RAW),
        lambda: content[:start] + opened * draw.choice([3, 40, 3000]) + content[start:],
        lambda: content.decode(errors="replace").encode(coded, errors="replace"),
    ]
    return draw.choice(ways)()


def _by_bytes(draw: random.Random) -> Case:
    files = _files(draw, _job(draw))
    name = draw.choices(["job.yaml", "clusters.yaml"], [3, 1])[0]
    if name == "clusters.yaml":
        files["job.yaml"] = f"name: j\ncommand: [a]\ncluster: {draw.choice(list(_CLUSTERS))}\n".encode()
    for _ in range(draw.choice([1, 1, 2, 3])):
        files[name] = _cut(draw, files[name])
    return Case(_words(draw), files)


def _override(draw: random.Random) -> str:
    above, parts = _job(draw), []
    while isinstance(above, (dict, list)) and above and len(parts) < 4:
        key = draw.choice(list(above) if isinstance(above, dict) else range(len(above)))
        parts.append(str(key if draw.random() < 0.95 else _misspelt(draw, key)))
        above = above[key]
        if draw.random() < 0.1:
            break
    value = _value(draw)
    text = value if isinstance(value, str) else json.dumps(value)
    if draw.random() < 0.2:
        text = draw.choice(_RAW).decode(errors="surrogateescape").replace("\0", "") + text
    return ".".join(parts) + draw.choice(["=", "=", "=", "=", "==", "", " = ", ":"]) + text.replace("\0", "")


def _by_override(draw: random.Random) -> Case:
    settings = [word for _ in range(draw.choice([1, 1, 2])) for word in ("--set", _override(draw))]
    return Case([*_words(draw), *settings], _files(draw, _job(draw)))


def _by_words(draw: random.Random) -> Case:
    commands = ["launch", "launch", "doctor", "ps", "logs", "attach", "cancel", "page", "lunch", ""]
    words = [draw.choice(commands)]
    for _ in range(draw.randrange(5)):
        words.append(draw.choice([*_OPTIONS, *_WORDS, "job.yaml", "job.yaml", _override(draw)]))
    if words[0] == "launch" and draw.random() < 0.7:
        words += ["job.yaml", "--dry-run", "--run-id", draw.choice(_WORDS)]
    return Case(words, _files(draw, _job(draw)))


def _by_environment(draw: random.Random) -> Case:
    values = ["", "/nowhere", "relative", "\udcff", "-1", "0,x", "a\nb", "é", "9" * 50, "/dev/null", "~", "0,0,GPU-x"]
    env = {draw.choice(_VARIABLES): draw.choice(values) for _ in range(draw.choice([1, 2, 3]))}
    return Case(_words(draw), _files(draw, _job(draw)), env)
