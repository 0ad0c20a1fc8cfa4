"""What blocks cost, counted on the model: by which stages are cut evenly where blocks are not of one size."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from meshwright.parallel.blocks import find_blocks
from meshwright.parallel.errors import WrapError
from meshwright.parallel.meta import MetaAnswers, without_values
from meshwright.parallel.microbatch import call, to_device
from meshwright.parallel.options import Options

__all__ = ["block_flops", "block_parameters", "settled"]


def settled(options: Options, model: nn.Module) -> Options:
    """The same options with costs as numbers; asked of the whole model, so that all ranks cut alike.

    Raises:
        WrapError: when FLOPs cannot be counted.
    """
    if not isinstance(options.stage_costs, str):
        return options
    if options.stage_costs == "parameters":
        counted = block_parameters(find_blocks(model, options.blocks))
    else:
        counted = block_flops(model, options)
    return replace(options, stage_costs=tuple(counted.values()))


def block_parameters(blocks: Mapping[str, nn.Module]) -> dict[str, int]:
    """Elements of the parameters of each block.

    >>> block_parameters({"0": nn.Linear(2, 3), "1": nn.Linear(2, 2)})
    {'0': 9, '1': 6}
    """
    return {name: sum(each.numel() for each in block.parameters()) for name, block in blocks.items()}


def block_flops(model: nn.Module, options: Options) -> dict[str, int]:
    """FLOPs of matrix products in the forward of each block on `options.example`, on shapes alone.

    Raises:
        WrapError: without an example, or when the model asks for values.
    """
    if options.example is None:
        raise WrapError(
            "stage_costs='flops' are counted on one micro-batch, and no example was given; pass example= as step() "
            "takes it, or use stage_costs='parameters'"
        )
    paper = without_values(model)
    blocks = find_blocks(paper, options.blocks)
    flops = dict.fromkeys(blocks, 0)
    counter = FlopCounterMode(display=False)

    def count(name: str, sign: int, *_: object) -> None:
        flops[name] += sign * int(counter.get_total_flops())

    for name, block in blocks.items():
        block.register_forward_pre_hook(partial(count, name, -1))
        block.register_forward_hook(partial(count, name, 1))
    try:
        with ExitStack() as inside:
            for context in (torch.no_grad(), MetaAnswers(), counter):
                inside.enter_context(context)
            call(paper, to_device(options.example, torch.device("meta")))
    except (RuntimeError, TypeError, KeyError) as error:
        raise WrapError(
            f"stage_costs='flops': the model cannot be run on its example for shapes alone ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); use stage_costs='parameters', or give numbers that you measured"
        ) from error
    return flops
