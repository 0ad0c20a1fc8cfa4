"""The same training step three ways: ours, and loops written by hand on torch's DDP and FSDP2 and on DeepSpeed."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import meshwright as mw

__all__ = [
    "batch_of",
    "build_llama",
    "ddp_step",
    "deepspeed_step",
    "fsdp2_step",
    "our_model",
    "our_step",
]

Step = Callable[[], object]


def build_llama(
    hidden: int = 256, layers: int = 6, vocabulary: int = 1024, intermediate: int | None = None, *, seed: int = 0
) -> nn.Module:
    """A llama of `transformers`, the same on every rank."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=intermediate or hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        vocab_size=vocabulary,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, nn.Module), type(model)
    return model


def batch_of(rank: int, *, samples: int = 4, length: int = 128, vocabulary: int = 1024) -> dict[str, torch.Tensor]:
    """One rank's samples; all tokens count."""
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, vocabulary, (samples, length), generator=generator)
    return {"input_ids": tokens, "labels": tokens.clone()}


def our_model(model: nn.Module, mesh: mw.Mesh, **options: Any) -> tuple[mw.ParallelModel, torch.optim.Optimizer]:
    """Our wrapping, with the optimizer a user would take."""
    wrapped = mw.parallelize(model, mesh, **options)
    return wrapped, wrapped.make_optimizer(lambda each: torch.optim.AdamW(each, lr=1e-4, fused=True))


def our_step(model: nn.Module, mesh: mw.Mesh, batch: dict[str, torch.Tensor], **options: Any) -> Step:
    """One step of ours."""
    wrapped, optimizer = our_model(model, mesh, **options)

    def step() -> None:
        wrapped.step(batch)
        optimizer.step()

    return step


def ddp_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> Step:
    """One step of torch's DDP as its tutorial writes it, with the bucket views that save a copy."""
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        wrapped(**batch).loss.backward()
        optimizer.step()

    return step


def fsdp2_step(model: nn.Module, batch: dict[str, torch.Tensor], num_ranks: int) -> Step:
    """One step of torch's FSDP2 as its tutorial writes it: each layer, then the root."""
    mesh = init_device_mesh("cpu", (num_ranks,))
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def deepspeed_step(model: nn.Module, batch: dict[str, torch.Tensor], stage: int, *, tensor_ranks: int = 1) -> Step:
    """One step of DeepSpeed's own engine, as its tutorial writes it; `tensor_ranks` above one is AutoTP."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an inference kernel, compiled at first use
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": len(batch["input_ids"]),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **({"tensor_parallel": {"autotp_size": tensor_ranks}} if tensor_ranks > 1 else {}),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def step() -> None:
        engine.backward(engine(**batch).loss)
        engine.step()

    return step
