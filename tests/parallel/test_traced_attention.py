"""Attention of a run on shapes: what this library's kernels keep and compute, by blocks or fused."""

from typing import Any

import pytest
import torch
from torch import nn

from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.blockwise.mask import Band
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.operations import Tally
from meshwright.parallel.options import Options
from meshwright.parallel.traced_attention import OwnAttention, Shared
from meshwright.parallel.tracing import trace
from meshwright.parallel.work import Traced
from tests.parallel.families import lm, words

LENGTH, HEADS, WIDTH = 64, 2, 8


class _Tracer:
    """Counts one tally."""

    def __init__(self) -> None:
        self.found = Tally()

    def tally(self) -> Any:
        return self.found


def _call(**how: Any) -> AttentionCall:
    query, key, value = (torch.zeros(1, HEADS, LENGTH, WIDTH, requires_grad=True) for _ in range(3))
    return AttentionCall(query=query, key=key, value=value, module=nn.Identity(), **how)


def _scores(mask: Band | None, shared: Shared | None = None) -> float:
    tracer = _Tracer()
    OwnAttention(tracer, Blockwise(), shared)(_call(mask=mask))
    (attention,) = tracer.found.attentions
    return attention.scores / (HEADS * LENGTH**2)


def test_a_window_costs_its_share_of_all_pairs() -> None:
    assert [_scores(mask) for mask in (None, Band(None, 0), Band(16, 0))] == [1.0, 0.5, 1 - (0.75**2 + 1) / 2]


def test_the_window_of_a_dealt_sequence_is_a_share_of_all_of_it() -> None:
    shared = Shared(4, lambda query, key, value: ((), ()))
    assert _scores(Band(64, 0), shared) == 4 * (1 - (0.75**2 + 1) / 2)
    assert _scores(Band(None, 0), shared) == 2.0


@pytest.mark.parametrize("how", [{}, {"mask": Band(None, 0)}, {"sinks": torch.zeros(HEADS)}])
def test_what_torch_has_a_kernel_for_keeps_no_scores(how: dict[str, Any]) -> None:
    tracer, kept = _Tracer(), list[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.numel()) or each, lambda each: each):
        OwnAttention(tracer, Blockwise(query_block=16, kv_block=16), None)(_call(**how))
    assert len(tracer.found.attentions) == 1
    assert max(kept) == HEADS * LENGTH * WIDTH


def _attends(**config: Any) -> Traced:
    model = lm("gemma2", num_hidden_layers=2, attn_logit_softcapping=50.0, **config)()
    return trace(model, Options(example=words(2, 48), loss="sum", blockwise=Blockwise(query_block=16, kv_block=16)))


def test_scores_that_are_capped_are_gone_through_by_blocks_and_not_kept() -> None:
    own = _attends().blocks["model.layers.1"]
    assert not own.forward.attentions  # products of blocks, and not a fused kernel
    model = lm("gemma2", num_hidden_layers=2, attn_logit_softcapping=50.0)()
    plain = trace(model, Options(example=words(2, 48), loss="sum")).blocks["model.layers.1"]
    heads = model.config.num_attention_heads
    assert plain.forward.saved_bytes - own.forward.saved_bytes > 2 * heads * 48 * 48 * 4


def test_how_large_blocks_are_decides_what_going_back_takes() -> None:
    def working_bytes(block: int) -> float:
        model = lm("gemma2", num_hidden_layers=2, attn_logit_softcapping=50.0)()
        sizes = Blockwise(query_block=block, kv_block=block)
        options = Options(example=words(2, 256), loss="sum", blockwise=sizes)
        return trace(model, options).blocks["model.layers.1"].backward.working_bytes

    assert working_bytes(256) > 1.5 * working_bytes(32)
