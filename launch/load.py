"""A job file to a `Job`: read the tree, apply overrides, look the cluster up, check.

Every problem of a file is reported at once, in the order of the file.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.launch.errors import JobError, Problem
from meshwright.launch.home import user_folder
from meshwright.launch.yaml_nodes import Found, Items, Node, Scalar, Table, follow, show
from meshwright.parallel.errors import nearest
from meshwright.parallel.pipeline.files import is_file

if TYPE_CHECKING:  # pydantic and PyYAML are imported when the first job is read
    from meshwright.launch.spec.job import Job
    from meshwright.launch.yaml_text import Tree

__all__ = ["CLUSTERS_FILE", "LoadedJob", "OpenJob", "check_job", "load_job", "open_job"]

CLUSTERS_FILE = "clusters.yaml"
"""Looked for beside the job, then in the user's configuration (~/.config/meshwright)."""


@dataclass(frozen=True)
class OpenJob:
    """A job file that was read and is not checked yet.

    Args:
        path: the file.
        text: the file as written.
        root: its tree, with the overrides.
        overrides: "dotted.key=value".
        problems: of the text.
    """

    path: Path
    text: str = field(repr=False)
    root: Table = field(repr=False)
    overrides: tuple[str, ...] = ()
    problems: tuple[Found, ...] = ()


@dataclass(frozen=True)
class LoadedJob:
    """A checked job, and where each of its keys was written.

    Args:
        job: the value.
        path: the file it was read from.
        text: the file as written, without overrides.
        keys: every dotted key the user wrote, overrides included.
        have: nodes that its cluster has for it, where the job does not name them; None where that is not known.
    """

    job: "Job"
    path: Path
    text: str = field(repr=False)
    keys: frozenset[str] = field(repr=False)
    _root: Table = field(repr=False)
    have: int | None = None

    def where(self, key: str = "") -> str:
        """Where a dotted key was written, "job.yaml:12:9"; for a key that was not, the nearest one above it."""
        parts = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        node: Node = self._root
        mark = node.mark
        for part in parts:
            below, below_mark, found = follow(node, (part,))
            if not found:
                break
            node, mark = below, below_mark
        return str(mark)


def load_job(path: Path | str, overrides: Sequence[str] = (), clusters_file: Path | str | None = None) -> LoadedJob:
    """Reads, checks and resolves a job file.

    Args:
        path: the YAML file.
        overrides: "dotted.key=value", applied in order before the job is checked.
        clusters_file: where named clusters are described; by default clusters.yaml beside the job, then the user's.

    Raises:
        JobError: with every problem found, each with its position.
    """
    return check_job(open_job(path, overrides), clusters_file)


def open_job(path: Path | str, overrides: Sequence[str] = ()) -> OpenJob:
    """Reads a job file and applies overrides, without looking at what the keys mean.

    Raises:
        JobError: when it cannot be read, or an override cannot be applied.
    """
    from meshwright.launch.overrides import apply_override

    path = Path(path)
    content = _read(path, "job file")
    tree = _tree(content, str(path))
    root: Node = tree.root
    if not isinstance(root, Table):
        raise _error([(root.mark, "", f"a job is a mapping of keys such as `name:`, got {show(root)}")], str(path))
    for place, text in enumerate(overrides):
        root = apply_override(root, text, place)
    assert isinstance(root, Table), root
    return OpenJob(path, content.decode("utf-8-sig"), root, tuple(overrides), tuple(tree.problems))


def check_job(opened: OpenJob, clusters_file: Path | str | None = None) -> LoadedJob:
    """Looks the cluster up and checks every key.

    Raises:
        JobError: with every problem found, each with its position.
    """
    path, keys = opened.path, frozenset(opened.root.dotted_keys())
    resolved, problems = _with_cluster(_with_schedule(opened.root, path), path, clusters_file)
    job = _check(resolved, [*opened.problems, *problems], str(path))
    return LoadedJob(job, path, opened.text, keys, resolved)


def _tree(content: bytes, source: str) -> "Tree":
    from meshwright.launch.yaml_text import read_tree

    return read_tree(content, source)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        others = sorted(str(each) for each in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = f"; {nearest(str(path), others)}" if others else ""
        message = f"this {what} does not exist{hint}"
    except (OSError, ValueError) as error:
        message = f"this {what} cannot be read: {getattr(error, 'strerror', None) or error}"
    raise JobError([Problem(f"{path}:1:1", "", message)])


def _check(root: Table, problems: list[Found], source: str) -> "Job":
    from pydantic import ValidationError

    from meshwright.launch.explain import explain
    from meshwright.launch.spec.job import Job

    try:
        job = Job.model_validate(root.plain())
    except ValidationError as error:
        noted = {(mark, key) for mark, key, _ in problems}  # these values have their problem already
        found = [each for each in explain(error, root, Job) if each[:2] not in noted]
        raise _error([*problems, *found], source) from None
    if problems:
        raise _error(problems, source)
    return job


def _error(found: Iterable[Found], source: str) -> JobError:
    """Sorts by position: the job file, other files, overrides."""

    def order(item: Found) -> tuple[bool, bool, str, int, int]:
        mark = item[0]
        return mark.line == 0, mark.source != source, mark.source if mark.line else "", mark.line, mark.column

    ordered = dict.fromkeys(sorted(found, key=order))
    return JobError([Problem(str(mark), key, message) for mark, key, message in ordered])


def _with_schedule(root: Table, path: Path) -> Table:
    """The same tree, with the file of a schedule as a path that holds wherever ranks start; it lies beside the job."""
    parallel = root.nodes.get("parallel")
    written = parallel.nodes.get("schedule") if isinstance(parallel, Table) else None
    if not isinstance(parallel, Table) or not isinstance(written, Scalar) or not is_file(written.value):
        return root
    found = replace(written, value=str((path.parent / written.text).absolute()))
    return replace(
        root, nodes={**root.nodes, "parallel": replace(parallel, nodes={**parallel.nodes, "schedule": found})}
    )


def _with_cluster(root: Table, path: Path, clusters_file: Path | str | None) -> tuple[Table, list[Found]]:
    node = root.nodes.get("cluster")
    if not isinstance(node, Scalar) or not isinstance(node.value, str):
        return root, []
    known: dict[str, Node] = {}
    problems: list[Found] = []
    files = [Path(clusters_file)] if clusters_file else [each for each in _cluster_files(path) if each.exists()]
    for file in files:
        found, wrong = _clusters(file)
        problems += wrong
        known = found | known
        if node.value in known:
            break
    if node.value in known:
        return _replaced(root, known[node.value]), problems
    if node.value != "local":
        place = f" in {' or '.join(map(str, files))}" if files else f": there is no {path.parent / CLUSTERS_FILE}"
        message = f"no cluster {node.value!r}{place}; {nearest(node.value, [*known, 'local'])}"
        problems.append((node.mark, "cluster", message))
    return _replaced(root, Table({}, {}, node.mark)), problems  # the local cluster with its defaults


def _replaced(root: Table, cluster: Node) -> Table:
    return Table({**root.nodes, "cluster": cluster}, root.marks, root.mark)


def _cluster_files(path: Path) -> tuple[Path, Path]:
    """Where named clusters are described: beside the job, and for all jobs of this user."""
    return path.parent / CLUSTERS_FILE, user_folder("XDG_CONFIG_HOME", ".config") / "meshwright" / CLUSTERS_FILE


def _clusters(file: Path) -> tuple[dict[str, Node], list[Found]]:
    tree = _tree(_read(file, "file of clusters"), str(file))
    root = tree.root
    if not isinstance(root, Table) or list(root.nodes) != ["clusters"]:
        shown = f"the keys {', '.join(root.nodes)}" if isinstance(root, Table) else show(root)
        return {}, [(root.mark, "", f"expected one key `clusters:` with a mapping of names, got {shown}")]
    clusters = root.nodes["clusters"]
    if isinstance(clusters, (Scalar, Items)):
        return {}, [(clusters.mark, "clusters", f"expected a mapping of names, got {show(clusters)}")]
    return dict(clusters.nodes), list(tree.problems)
