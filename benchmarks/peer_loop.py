"""What one writes by hand for torchrun: DDP or FSDP2 around the quickstart's llama, on the same text, until some step.

Started by `benchmarks.launch` as `torchrun --nproc-per-node N -m benchmarks.peer_loop JOB STEPS KIND OUT`; rank 0
writes the time at which the first step ended and the seconds of each step to OUT.
"""

import json
import os
import sys
import sysconfig
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

__all__ = ["main"]


def _tokens(max_bytes: int) -> torch.Tensor:
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= max_bytes:
            break
    return torch.frombuffer(text[:max_bytes], dtype=torch.uint8)


def _model(spec: dict[str, Any]) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(spec["architecture"], vocab_size=257, use_cache=False, **spec["config"])
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def main() -> None:
    """Trains for some steps and writes when and how long."""
    job_path, num_steps, kind, out = sys.argv[1:5]
    job = yaml.safe_load(Path(job_path).read_text())
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokens = _tokens(1 << 21)
    model = _model(job["model"])
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (world_size,))
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)  # type: ignore[arg-type]
        wrapped: torch.nn.Module = fully_shard(model, mesh=mesh)
    else:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3, fused=True)
    length, samples = job["data"]["sequence_length"], job["train"]["batch_size"] // world_size
    generator = torch.Generator().manual_seed(rank)
    ends_s = [time.time()]
    for _ in range(int(num_steps)):
        starts = torch.randint(0, len(tokens) - length, (samples,), generator=generator)
        inputs = torch.stack([tokens[start : start + length] for start in starts]).long()
        optimizer.zero_grad()
        wrapped(input_ids=inputs, labels=inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        ends_s.append(time.time())
    if rank == 0:
        steps_s = [end - start for start, end in pairwise(ends_s)]
        Path(out).write_text(json.dumps({"first_step_unix_s": ends_s[1], "step_s": steps_s}))
    dist.barrier()  # a rank that leaves early takes the store with it, for which the others may wait forever
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
