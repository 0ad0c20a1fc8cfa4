"""Memory that one of four ranks needs to make its share of a model of 7 billion parameters, whole model never built.

Each mesh is tried in a process of its own, as rank 0 of a process group whose other ranks do not exist (torch's
"fake" backend). What is compared is the largest resident memory above what torch itself takes, with the size of the
whole model; the wrapping is part of it.
`python -m benchmarks.init [--json] [--dtype float32]`
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

import meshwright as mw

__all__ = ["main"]

_RANKS = 4


def _llama() -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
    config = AutoConfig.for_model("llama", vocab_size=32000, use_cache=False, **shape)
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, torch.nn.Module)
    return model


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _one_rank(axis: str, dtype: str) -> dict[str, Any]:
    """Wraps the model as rank 0 of four and returns bytes and seconds."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=_RANKS, store=FakeStore())
    torch.set_default_dtype(getattr(torch, dtype))
    before_bytes, start_s = _peak_bytes(), time.monotonic()
    model = mw.deferred(_llama, seed=0)
    full_bytes = sum(each.numel() * each.element_size() for each in model.parameters())
    built_s = time.monotonic() - start_s
    wrapped = mw.parallelize(model, mw.Mesh(**{axis: _RANKS}))
    held_bytes = sum(
        each.to_local().numel() * each.element_size()
        if hasattr(each, "to_local")
        else each.numel() * each.element_size()
        for each in wrapped.parameters()
    )
    needed_bytes = _peak_bytes() - before_bytes
    return {
        "mesh": f"{axis}={_RANKS}",
        "full_bytes": full_bytes,
        "held_bytes": held_bytes,
        "needed_bytes": needed_bytes,
        "needed_of_full": needed_bytes / full_bytes,
        "build_s": built_s,
        "total_s": time.monotonic() - start_s,
    }


def main() -> int:
    """Measures both meshes and prints them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--axis", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.axis:
        sys.stdout.write(json.dumps(_one_rank(options.axis, options.dtype)) + "\n")
        return 0
    rows = []
    for axis in ("fsdp", "tp"):
        command = [sys.executable, "-m", "benchmarks.init", "--axis", axis, "--dtype", options.dtype]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    if options.json:
        worst = max(row["needed_of_full"] for row in rows)
        sys.stdout.write(json.dumps({"dtype": options.dtype, "rows": rows, "worst_needed_of_full": worst}) + "\n")
        return 0
    for row in rows:
        sys.stdout.write(
            f"{row['mesh']:8} whole {row['full_bytes'] / 1e9:6.2f} GB  held {row['held_bytes'] / 1e9:5.2f} GB  "
            f"needed {row['needed_bytes'] / 1e9:5.2f} GB = {row['needed_of_full']:.3f} of the whole  "
            f"{row['total_s']:.0f} s (recording {row['build_s']:.1f} s)\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
