"""Ranks must hold the same model before it is split; a difference is named, not averaged away."""

from hashlib import blake2b

import torch
from torch import Tensor, nn

from meshwright.parallel.collectives import Groups
from meshwright.parallel.deferred import recipe_text
from meshwright.parallel.errors import WrapError
from meshwright.parallel.mesh import AXES, DATA_AXES

__all__ = ["check_agreement", "check_buffers", "check_losses", "fingerprint"]

_LOSS_TOLERANCE = 1e-7  # relative, about one step of float32: the same numbers in the same order
_ROW = 1024  # elements hashed together: the order of rows counts, the order inside one does not


def fingerprint(name: str, tensor: Tensor, recipe: str = "") -> int:
    """A 62-bit number of name, shape, dtype and every bit of a tensor (not of their order among 1024 neighbours).

    >>> fingerprint("w", torch.tensor([1.0, 2.0])) == fingerprint("w", torch.tensor([1.0, 2.5]))
    False
    """
    digest = blake2b(f"{name} {tuple(tensor.shape)} {tensor.dtype} {recipe}".encode(), digest_size=8)
    if not tensor.is_meta and tensor.numel():
        flat = tensor.detach().reshape(-1)
        whole = flat.numel() // _ROW * _ROW
        for part in (flat[:whole].view(-1, _ROW), flat[whole:].view(-1, 1)):
            if part.numel():
                digest.update(torch.hash_tensor(part, dim=1).cpu().view(torch.int64).numpy().tobytes())
    return int.from_bytes(digest.digest(), "big") >> 2


def check_agreement(model: nn.Module, groups: Groups) -> None:
    """Compares every parameter and buffer over all ranks.

    Raises:
        WrapError: naming the first tensor that differs and the ranks that disagree with rank 0.
    """
    if groups.group(*AXES) is None:
        return
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = sorted(tensors)
    everywhere = torch.tensor([len(names), fingerprint(" ".join(names), torch.empty(0))])
    shapes = torch.stack(groups.all_gather(everywhere.to(groups.device_type), *AXES)).cpu()
    if not bool((shapes == shapes[0]).all()):
        raise WrapError(f"ranks built different models: parameters and buffers per rank {shapes[:, 0].tolist()}")
    mine = torch.tensor(
        [fingerprint(name, tensors[name], recipe_text(model, name)) for name in names], device=groups.device_type
    )
    marks = torch.stack(groups.all_gather(mine, *AXES)).cpu()
    for column, name in enumerate(names):
        odd = [rank for rank in range(len(marks)) if marks[rank, column] != marks[0, column]]
        if odd:
            raise WrapError(
                f"ranks {odd} hold another {name} than rank 0; build the model from one seed on every rank "
                "(torch.manual_seed before the constructor), or load the same weights"
            )


def check_buffers(model: nn.Module, groups: Groups) -> None:
    """Compares buffers over data ranks after a step has run: running batch statistics would differ by now.

    In the plain run such a buffer has one value; ranks that each keep their own would save and evaluate another model
    than they trained.

    Raises:
        WrapError: naming the buffers that differ.
    """
    buffers = dict(model.named_buffers())
    if not buffers or groups.group(*DATA_AXES) is None:
        return
    mine = torch.tensor([fingerprint(name, each) for name, each in buffers.items()], device=groups.device_type)
    marks = torch.stack(groups.all_gather(mine, *DATA_AXES)).cpu()
    odd = [name for column, name in enumerate(buffers) if bool((marks[:, column] != marks[0, column]).any())]
    if odd:
        raise WrapError(
            f"buffers differ between data ranks after a step: {', '.join(odd)}; batch statistics must be one: freeze "
            "them (module.eval()), set track_running_stats=False, or convert the model with "
            "torch.nn.SyncBatchNorm.convert_sync_batchnorm (GPU)"
        )


def check_losses(losses: Tensor, groups: Groups) -> None:
    """Compares the losses of micro-batches (1-dim) over `cp`, whose ranks compute them from the same joined values.

    Raises:
        WrapError: where something of a block reached the loss beside the stream, of one rank's positions only.
    """
    if groups.group("cp") is None:
        return
    found = torch.stack(groups.all_gather(losses.detach().nan_to_num(), "cp"))
    spread = (found - found[0]).abs().amax(0)
    if bool((spread > _LOSS_TOLERANCE * found[0].abs()).any()):
        each = ", ".join(f"{float(loss):.9g}" for loss in found[:, int(spread.argmax())])
        raise WrapError(
            f"ranks of cp come to different losses ({each}): something that blocks make besides the stream reaches the "
            "loss (router logits, hidden states), and each rank has that of its own positions; switch it off "
            "(output_router_logits=False), or deal the batch over dp"
        )
