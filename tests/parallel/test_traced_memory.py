"""What a block keeps, works with and makes of gradients, told from storages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.parallel.options import Options
from meshwright.parallel.tracing import trace
from meshwright.parallel.work import Passes, Traced


class _Tied(nn.Module):
    """Two blocks between a table and the same table."""

    def __init__(self, dropped: float = 0.0) -> None:
        super().__init__()
        self.table, self.dropped = nn.Linear(8, 8, bias=False), dropped
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        for each in self.layers:
            x = each(x)
        heads = x.view(2, 4, 2, 4).transpose(1, 2)
        seen = functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=self.dropped)
        return functional.dropout(self.table(seen.transpose(1, 2).reshape(2, 4, 8)), self.dropped).pow(2).sum()


def _traced(dropped: float = 0.0, **how: Any) -> Traced:
    return trace(_Tied(dropped), Options(example=torch.zeros(2, 4, 8)), **how)


class _Summed(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], width: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, width)
        self.layers = nn.ModuleList(block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for each in self.layers:
            x = each(x)
        return x.sum()


def _block(block: Callable[[], nn.Module], x: Tensor) -> Passes:
    return trace(_Summed(block, x.shape[-1]), Options(example=x)).blocks["layers.0"]


TABLE, LINE, STREAM = 4 * 8 * 8, 4 * (8 * 8 + 8), 4 * 2 * 4 * 8


def test_a_gradient_is_made_where_backward_reaches_its_parameter_first() -> None:
    found = _traced()
    assert (found.after.made_bytes, found.before.made_bytes) == (TABLE, 0.0)
    assert [each.made_bytes for each in found.blocks.values()] == [LINE, LINE]
    assert [each.is_tied for each in (found.before, *found.blocks.values(), found.after)] == [True, False, False, True]


def test_gradients_that_stay_are_alive_together() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = (nn.Linear(64, 64, bias=False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.one(x))

    block = _block(Block, torch.zeros(2, 64)).backward
    assert block.growing_bytes >= block.working_bytes + 0.9 * 4 * 64 * 64


def test_inputs_that_a_block_keeps_itself_are_not_kept_twice() -> None:
    block = _traced().blocks["layers.0"]
    assert block.input_bytes == block.reread_bytes == block.forward.saved_bytes == STREAM


def test_attention_that_drops_by_own_kernels_is_what_these_compute_and_keeps_no_scores() -> None:
    options = Options.of(example=torch.zeros(2, 4, 8), blockwise={"query_block": 2})
    found, gpu = trace(_Tied(0.1), options, on_cpu=True).after.forward, _traced(0.1).after.forward
    assert len(found.attentions) == 0
    assert len(found.products) == len(gpu.products) + 2 * 2  # two for each block of queries
    assert found.drawn > gpu.drawn  # the seed
    assert found.saved_bytes == gpu.saved_bytes + (4 - 1) * 2 * 4 * 8  # a mask of dropout, in whole numbers there


@pytest.mark.parametrize("by_blocks", [False, True])
def test_a_mask_that_says_yes_or_no_is_kept_as_scores_by_torch_alone(by_blocks: bool) -> None:
    class Block(nn.Module):
        def __init__(self, masked: bool) -> None:
            super().__init__()
            self.masked = masked

        def forward(self, x: Tensor) -> Tensor:
            mask = x.new_ones(x.shape[1], x.shape[1], dtype=torch.bool) if self.masked else None
            return functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    example, sizes = torch.zeros(2, 8, 4), {"query_block": 4} if by_blocks else None
    options = Options.of(example=example, blockwise=sizes)
    both = [trace(_Summed(lambda masked=each: Block(masked), 4), options) for each in (True, False)]
    more = both[0].blocks["layers.0"].forward.saved_bytes - both[1].blocks["layers.0"].forward.saved_bytes
    assert more == (0 if by_blocks else 4 * 8 * 8)


def test_gradients_wait_between_halves_where_weights_meet_what_goes_on() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.scale = nn.Linear(8, 32), nn.Linear(32, 8, bias=False), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).exp()) * (self.scale * self.scale)

    assert _block(Block, torch.zeros(64, 8)).waiting_bytes == 4 * 64 * (32 + 8 + 8)


def test_what_was_recomputed_is_held_to_the_end_of_backward() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).exp()).exp().exp()  # gradients are widest when the last two are let go

    block = _block(Block, torch.zeros(64, 8))
    assert block.backward.holding_bytes >= block.backward.working_bytes + 4 * 64 * 8


def test_on_a_cpu_attention_that_drops_is_what_torch_computes_and_draws() -> None:
    gpu, cpu = (_traced(0.1, on_cpu=each) for each in (False, True))
    scores, stream = 2 * 2 * 4 * 4, 2 * 4 * 8
    assert (len(gpu.after.forward.attentions), len(cpu.after.forward.attentions)) == (1, 0)
    assert len(cpu.after.forward.products) == len(gpu.after.forward.products) + 2
    assert (gpu.after.forward.drawn, cpu.after.forward.drawn) == (stream, scores + stream)
    assert cpu.after.forward.saved_bytes > gpu.after.forward.saved_bytes + 3 * 4 * stream  # noise in whole numbers


def test_on_a_cpu_dropout_keeps_what_it_drew() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(self.line(x), 0.5).sum()

    gpu, cpu = (trace(Drops(), Options(example=torch.zeros(4, 8)), on_cpu=each).before for each in (False, True))
    assert cpu.forward.saved_bytes - gpu.forward.saved_bytes == (4 - 1) * 4 * 8


def test_on_a_cpu_attention_that_does_not_drop_is_fused() -> None:
    assert len(_traced(on_cpu=True).after.forward.attentions) == 1


@pytest.mark.parametrize("on_cpu", [False, True])
def test_without_dropout_nothing_is_drawn(on_cpu: bool) -> None:
    assert _traced(on_cpu=on_cpu).after.forward.drawn == 0
