"""A job rehearsed on this machine: its model, text and mesh, small enough to be compared with the plain run.

Meshes of more than eight ranks and models of more than fifty million parameters are cut down; what was cut is said.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import gcd, prod
from typing import TYPE_CHECKING, Any

from meshwright.launch.errors import JobError, Problem
from meshwright.launch.load import LoadedJob
from meshwright.parallel.errors import MeshwrightError
from meshwright.parallel.mesh import AXES, Mesh
from meshwright.parallel.pipeline.files import is_file

if TYPE_CHECKING:
    from torch import nn

    from meshwright.parallel.options import Options
    from meshwright.parallel.parity import ParityReport
    from meshwright.parallel.report import WrapReport

__all__ = ["Rehearsal", "model_on_meta", "rehearse", "report_on_meta", "settled_on_meta", "shrunk_mesh"]

_MAX_RANKS = 8
_MAX_PARAMETERS = 50_000_000
_MAX_TEXT_BYTES = 1 << 18
_MAX_SEQUENCE_LENGTH = 128


@dataclass(frozen=True)
class Rehearsal:
    """What `verify` is called with, and what had to be cut down to fit here."""

    build_model: Callable[[], Any]
    build_batch: Callable[[], Any]
    mesh: Mesh
    options: Mapping[str, Any]
    notes: tuple[str, ...]
    where: str = ""

    def run(self) -> "ParityReport":
        """Starts the ranks and compares the step with the plain run.

        Raises:
            JobError: when the mesh cannot be had.
        """
        from meshwright.parallel.verify import verify

        with _said_of(self.where):
            report = verify(self.build_model, self.build_batch, self.mesh, **self.options)
        return replace(report, notes=(*self.notes, *report.notes))


def rehearse(loaded: LoadedJob) -> Rehearsal:
    """Turns a job into a rehearsal.

    Raises:
        JobError: when the job trains no model.
    """
    job = loaded.job
    if job.model is None or job.data is None:
        text = "the job runs a command, so there is no model to wrap; give it model: and data:"
        raise JobError([Problem(loaded.where("model"), "model", text)])
    mesh, notes = shrunk_mesh(job.mesh)
    config, cut = _shrunk_config(loaded)
    spec = {**job.as_dict()["model"], "config": config}
    data = job.as_dict()["data"]
    options, dropped = _fitting_options(loaded, mesh, is_cut=bool(cut))
    num_samples = 2 * mesh.data_degree * job.parallel.num_microbatches + 1  # one more than divides: uneven shares
    return Rehearsal(
        build_model=partial(_build_model, spec, data, job.train.seed if job.train else 0),
        build_batch=partial(_build_batch, data, num_samples),
        mesh=mesh,
        options=options,
        notes=(*notes, *cut, *dropped),
        where=loaded.where("parallel"),
    )


def report_on_meta(loaded: LoadedJob) -> tuple["nn.Module", "WrapReport"]:
    """The job's model as the first rank of `tp` would hold it, and the wrap report, without weights or ranks.

    Raises:
        JobError: when the mesh cannot be had.
    """
    from meshwright.parallel.blockwise.install import BlockwiseAttention
    from meshwright.parallel.plan import make_plans
    from meshwright.parallel.predicted import first_shares
    from meshwright.parallel.report import describe

    mesh, model = loaded.job.mesh, model_on_meta(loaded)
    with _said_of(loaded.where("parallel")):
        options = settled_on_meta(loaded, model)
        options.check(mesh)
        plans = make_plans(model, mesh, options)
        report = describe(model, mesh, options, plans)
        if options.sizes is not None and mesh.cp == 1:
            report = BlockwiseAttention(model, options.sizes, options.example).described(report)
        return first_shares(model, plans.tensor), report


def settled_on_meta(loaded: LoadedJob, model: "nn.Module") -> "Options":
    """The job's options of `parallelize`, with what is counted on a whole model as numbers."""
    from meshwright.launch.worker.example import example_batch
    from meshwright.parallel.costs import settled
    from meshwright.parallel.options import Options

    return settled(Options.of(**loaded.job.options, example=example_batch(loaded.job, device="meta")), model)


@contextmanager
def _said_of(where: str) -> Iterator[None]:
    """Says of the job's `parallel:` what turns out when its model is looked at."""
    try:
        yield
    except JobError:
        raise
    except MeshwrightError as error:
        raise JobError([Problem(where, "parallel", str(error))]) from error


def model_on_meta(loaded: LoadedJob, *, values: bool = True) -> "nn.Module":
    """The job's model without its weights: shapes only, and how to make its values where these are wanted."""
    from meshwright.launch.worker.model import build_model

    job = loaded.job
    assert job.model is not None, "checked by the caller"
    vocabulary = _vocabulary(job.as_dict()["data"])
    return build_model(job.as_dict()["model"], vocab_size=vocabulary, seed=0, values=values)


def shrunk_mesh(mesh: Mesh, max_ranks: int = _MAX_RANKS) -> tuple[Mesh, tuple[str, ...]]:
    """A mesh of at most `max_ranks` with the same axes above one, and what was cut.

    >>> shrunk_mesh(Mesh(dp=64, fsdp=8))
    (Mesh(pp=1, dp=2, fsdp=2, cp=1, tp=1, ep=1, ep_node=1), ('dp=64 rehearsed as dp=2', 'fsdp=8 rehearsed as fsdp=2'))
    """
    if mesh.world_size <= max_ranks:
        return mesh, ()
    degrees = {axis: min(2, mesh.degree(axis)) for axis in AXES}
    for axis in AXES:  # more than three axes do not fit: the outermost give way, one by one
        if prod(degrees.values()) > max_ranks:
            degrees[axis] = 1
    notes = [
        f"{axis}={mesh.degree(axis)} rehearsed as {axis}={degrees[axis]}"
        for axis in AXES
        if degrees[axis] != mesh.degree(axis)
    ]
    ep = gcd(mesh.ep, prod(degrees[axis] for axis in AXES if axis != "pp"))
    notes += [f"ep={mesh.ep} rehearsed as ep={ep}"] if ep != mesh.ep else []
    return Mesh.of({**degrees, "ep": ep, "ep_node": gcd(mesh.ep_node, ep)}), tuple(notes)


def _shrunk_config(loaded: LoadedJob) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The model's config, with fewer layers and narrower ones where the model is too large to rehearse."""
    model = model_on_meta(loaded)
    written = dict(loaded.job.as_dict()["model"]["config"])
    whole = sum(each.numel() for each in model.parameters())
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if whole <= _MAX_PARAMETERS or heads is None:
        return written, ()
    small = {"num_hidden_layers": 2, "hidden_size": 8 * heads, "intermediate_size": 16 * heads, "head_dim": 8}
    cut = {name: value for name, value in small.items() if getattr(config, name, None) is not None}
    shown = ", ".join(f"{name} {getattr(config, name)} -> {value}" for name, value in cut.items())
    return {**written, **cut}, (f"{whole:,} parameters are too many to rehearse; cut down: {shown}",)


def _fitting_options(loaded: LoadedJob, mesh: Mesh, *, is_cut: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The job's options, without what holds for the whole mesh or model only where those were cut down."""
    options = dict(loaded.job.options)
    if mesh.pp == loaded.job.mesh.pp and not is_cut:
        return options, ()
    dropped = [name for name in ("placement", "stage_costs") if options[name] not in (None, "parameters", "flops")]
    options.update(dict.fromkeys(dropped))
    if is_file(options["schedule"]):
        dropped.append("schedule")
        options["schedule"] = "1f1b" if mesh.pp > 1 else "layered"
    return options, tuple(f"parallel.{name} is for all ranks and blocks; rehearsed without it" for name in dropped)


def _build_model(spec: dict[str, Any], data: dict[str, Any], seed: int) -> "nn.Module":
    from meshwright.launch.worker.model import build_model

    return build_model(spec, vocab_size=_vocabulary(data), seed=seed)


def _build_batch(data: dict[str, Any], num_samples: int) -> dict[str, Any]:
    import torch

    from meshwright.launch.worker.text import lay_out

    tokenizer, documents = _text(data)
    short = {**data, "sequence_length": min(data["sequence_length"], _MAX_SEQUENCE_LENGTH)}
    laid = lay_out(documents, tokenizer, short)
    if data["batching"] == "packed":  # rows of one length, since ranks take their shares of a batch by rows
        rows = [laid.batch([(3 * row + place) % len(laid) for place in range(3)]) for row in range(num_samples)]
        length = min(row["input_ids"].shape[1] for row in rows)
        return {name: torch.cat([row[name][:, :length] for row in rows]) for name in rows[0]}
    return laid.batch([each % len(laid) for each in range(num_samples)])


def _vocabulary(data: dict[str, Any] | None) -> int:
    if data is None:
        return 257
    if data["tokenizer"] == "bytes":
        from meshwright.launch.worker.tokenizer import byte_tokenizer

        return byte_tokenizer().vocab_size
    return int(_text(data)[0].vocab_size)


def _text(data: dict[str, Any]) -> tuple[Any, list[Any]]:
    from meshwright.launch.worker.corpus import read_documents
    from meshwright.launch.worker.tokenizer import make_tokenizer

    capped = min(data["max_bytes"] or _MAX_TEXT_BYTES, _MAX_TEXT_BYTES)
    documents = read_documents(data["files"], max_bytes=capped)
    return make_tokenizer(data["tokenizer"], documents), documents
