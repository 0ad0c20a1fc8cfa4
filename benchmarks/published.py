"""Published training runs, as tables have them: what was trained, how, on what, and how long a step took.

A table's columns are those of `benchmarks/data/published_runs.csv`. What a source does not say is taken to be usual;
each such assumption is listed with the run:

- attention kept its scores in memory, and nothing was overlapped, on A100 and older GPUs with sequences up to 2,048 and
  a plain feed-forward, unless the notes speak of flash attention: fused kernels came in 2022, gated layers with LLaMA
- elsewhere an empty column means that tp deals positions and hides its collectives, as NVIDIA's recipes do
- heads are 128 wide, vocabularies GPT-2's, networks those that such nodes usually have
"""

import csv
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster, Engine, Layout, Training, Transformer
from meshwright.clusters.simulated.layout import Recompute

__all__ = [
    "LACKING",
    "LeftOutError",
    "Row",
    "Run",
    "measured_step_s",
    "network_bytes_per_s",
    "nics_per_gpu",
    "read",
    "run_of",
]

Row = Mapping[str, str]
LACKING = "not given"  # begins the reason of a row that lacks columns

_NEEDED = ("layers", "hidden", "ffn_hidden", "seq_len", "global_batch", "micro_batch", "tp", "pp", "n_gpus")
_NEEDED_SPARSE = tuple("moe_ffn_hidden" if name == "ffn_hidden" else name for name in _NEEDED)
_VOCABULARY = 51200  # GPT-2's, padded as Megatron-LM does for 8 ranks
_HEAD_DIM = 128


class LeftOutError(ValueError):
    """A row that cannot be predicted, and why."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row.

    Args:
        line: in its file, the header being 1.
        source: who measured.
        training: what was trained, how, on what.
        measured_s: a step; None where only memory was.
        memory_bytes: of the fullest GPU; None where nobody said.
        only_tensors: the memory is that of tensors, added up by the source, not measured.
        assumed: what the source does not say.
    """

    line: int
    source: str
    training: Training
    measured_s: float | None
    memory_bytes: float | None
    only_tensors: bool
    assumed: tuple[str, ...] = ()


def read(path: Path) -> Iterator[tuple[int, Row]]:
    """Lines of a table with their numbers; columns that it lacks are empty."""
    with path.open(encoding="utf-8", newline="") as file:
        for line, row in enumerate(csv.DictReader(file, restval=""), start=2):
            yield line, defaultdict(str, row)


def run_of(line: int, row: Row) -> Run:
    """What a row says.

    Raises:
        LeftOutError: it says too little, or what does not agree with itself.
    """
    if row["evidence"].startswith("recalled"):
        raise LeftOutError("recalled from memory, not seen in a source")
    if missing := [name for name in (_NEEDED_SPARSE if row["n_experts"] else _NEEDED) if not row[name]]:
        raise LeftOutError(f"{LACKING}: {', '.join(missing)}")
    if row["metric"] == "oom":
        raise LeftOutError("ran out of memory")
    assumed: list[str] = []
    try:
        training = _training(row, assumed)
        measured_s = measured_step_s(row, training)
        memory_bytes = float(row["mem_gib"]) * 2**30 if row["mem_gib"] else None
    except ValueError as error:
        raise LeftOutError(str(error)) from error
    if measured_s is None and memory_bytes is None:
        raise LeftOutError(f"no step time and no memory (metric {row['metric']})")
    return Run(
        line=line,
        source=row["source"],
        training=training,
        measured_s=measured_s,
        memory_bytes=memory_bytes,
        only_tensors=row["notes"].startswith("params+grads+optimizer"),
        assumed=tuple(assumed),
    )


def _number(row: Row, name: str, default: int) -> int:
    return int(float(row[name])) if row[name] else default


def _training(row: Row, assumed: list[str]) -> Training:
    kind = gpu(row["gpu"])
    model = _model(row, assumed)
    per_node = _number(row, "gpus_per_node", 8)
    network = network_bytes_per_s(row["network"], per_node)
    if network is None:
        assumed.append("usual network of such nodes")
    cluster = Cluster(
        gpu=kind,
        num_gpus=_number(row, "n_gpus", 1),
        gpus_per_node=kind.nvlink_gpus or per_node,
        network_bytes_per_s=network,
        nics_per_gpu=nics_per_gpu(row["network"], per_node),
        fabric="efa" if "EFA" in row["network"] else "rdma",
    )
    old = kind.generation in ("volta", "ampere") and model.sequence <= 2048 and not model.gated
    old = old and "flash" not in row["notes"].lower()
    assumed.append("scores in memory, nothing overlapped" if old else "fused attention, overlapped collectives")
    layout = _layout(row, cluster, old=old)
    return Training(model=model, layout=layout, cluster=cluster, engine=_engine(row, layout, old=old))


def _model(row: Row, assumed: list[str]) -> Transformer:
    hidden, experts = _number(row, "hidden", 1), _number(row, "n_experts", 0)
    heads, vocab = _number(row, "heads", 0), _number(row, "vocab", 0)
    if not heads:
        heads = max(1, hidden // _HEAD_DIM)
        assumed.append(f"{heads} heads")
    if not vocab:
        vocab = _VOCABULARY
        assumed.append(f"vocabulary {vocab}")
    gated = row["mlp"] == "swiglu"
    return Transformer(
        layers=_number(row, "layers", 1),
        hidden=hidden,
        heads=heads,
        kv_heads=_number(row, "kv_heads", heads),
        ffn=_number(row, "moe_ffn_hidden" if experts else "ffn_hidden", 1),
        vocab=vocab,
        sequence=_number(row, "seq_len", 1),
        gated=gated,
        tied=not gated,
        experts=experts,
        top_k=_number(row, "top_k", 1) if experts else 0,
    )


def _layout(row: Row, cluster: Cluster, *, old: bool) -> Layout:
    tp, pp, cp = (_number(row, name, 1) for name in ("tp", "pp", "cp"))
    words = row["recompute"]
    recompute: Recompute = "full" if words == "full" else "selective" if words.startswith("selective") else "none"
    zero_bubble = row["schedule"].startswith(("zb", "zero-bubble", "v-", "dualpipe"))
    return Layout(
        tp=tp,
        cp=cp,
        ep=_number(row, "ep", 1),
        dp=_number(row, "dp", max(1, cluster.num_gpus // (tp * pp * cp))),
        pp=pp,
        vpp=_number(row, "vpp", 1) if pp > 1 else 1,
        micro_batch=_number(row, "micro_batch", 1),
        global_batch=_number(row, "global_batch", 1),
        schedule="zero-bubble" if zero_bubble else "1f1b",
        recompute=recompute,
        sequence_parallel=row["seq_parallel"] == "1" or (not row["seq_parallel"] and not old and tp > 1),
        zero_stage=_number(row, "zero_stage", 0),
    )


def _engine(row: Row, layout: Layout, *, old: bool) -> Engine:
    words = row["precision"].lower()
    sharded = layout.zero_stage > 1 and words == "bf16"  # FSDP in pure bf16 reduces in bf16
    return Engine(
        precision="fp4" if "fp4" in words else "fp8" if "fp8" in words else "bf16",
        gradient_bytes=2 if "fp16" in words or sharded else 4,
        fused_attention=not old,
        overlapped=not old,
        overlapped_tp=not old and layout.tp > 1 and not row["seq_parallel"],
        split_transfers="DeepSpeed" not in row["schedule"],
        stops_early=not old,
        once_per_node="dispatcher A2A" not in row["notes"],
        host_in_series="DeepSpeed" in row["schedule"],
    )


def network_bytes_per_s(words: str, gpus_per_node: int) -> float | None:
    """A GPU's share of a network that is described in words; None where they say no number.

    >>> network_bytes_per_s("4x200Gb/s HDR IB per node", 8) / 1e9, network_bytes_per_s("400Gb/s RDMA per GPU", 8) / 1e9
    (12.5, 50.0)
    """
    if found := re.search(r"([\d.]+)\s*Gb/s[^,;(]*per GPU", words):
        return float(found[1]) / 8 * 1e9
    if found := re.search(r"(\d+)x\s*([\d.]+)\s*(Gb|GB)/s", words):
        each = float(found[2]) * (1e9 if found[3] == "GB" else 1e9 / 8)
        return int(found[1]) * each / gpus_per_node
    if found := re.search(r"([\d.]+)\s*Gb/s", words):
        return float(found[1]) / 8 / gpus_per_node * 1e9
    return None


def nics_per_gpu(words: str, gpus_per_node: int) -> float:
    """Network cards of a GPU in a network that is described in words; one where they say no number.

    >>> nics_per_gpu("AWS EFA v1 4x100Gb/s per node", 8), nics_per_gpu("NDR 400Gb/s", 8)
    (0.5, 1.0)
    """
    found = re.search(r"(\d+)x\s*[\d.]+\s*G[bB]/s", words)
    return int(found[1]) / gpus_per_node if found else 1.0


def measured_step_s(row: Row, training: Training) -> float | None:
    """Seconds of a step: as given, or from samples, tokens or FLOP/s; None where the row has none of them.

    What its FLOP/s count is said by the row's convention: all scores or those below the diagonal, recomputing or not.
    """
    sequences = training.layout.global_batch
    tokens_of_gpu = sequences * training.model.sequence / training.cluster.num_gpus
    if row["step_s"]:
        return float(row["step_s"])
    if row["samples_per_s"]:
        return sequences / float(row["samples_per_s"])
    if row["tokens_per_s_per_gpu"]:
        return tokens_of_gpu / float(row["tokens_per_s_per_gpu"])
    rate = _flops_per_s(row, training)
    if rate is None:
        return None
    basis = row["flop_basis"]
    return (
        tokens_of_gpu * training.model.flops_per_token(causal="causal" in basis, recompute="hardware" in basis) / rate
    )


def _flops_per_s(row: Row, training: Training) -> float | None:
    if row["tflops_per_gpu"]:
        return float(row["tflops_per_gpu"]) * 1e12
    if row["mfu_pct"]:
        return float(row["mfu_pct"]) / 100 * training.cluster.gpu.half_flops_per_s
    return None
