"""Blocks that run by spans, and networks by blocks, on shapes: what they compute again, keep and have at work."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import BaseTorchFunctionMode

from meshwright.parallel.fake_rank import first_footprint
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.options import Options
from meshwright.parallel.plan import make_plans, make_span_plan
from meshwright.parallel.tracing import trace
from meshwright.parallel.work import Passes, Traced
from tests.parallel.families import FAMILIES, lm, words

WIDTH, HEADS, LENGTH, SAMPLES = 8, 2, 12, 2


class _Block(nn.Module):
    """Three products and attention."""

    def __init__(self, dropped: float) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.last, self.dropped = nn.Linear(WIDTH, WIDTH, bias=False), dropped

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.into(x).chunk(3, dim=-1))
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = functional.dropout(self.out(seen.transpose(1, 2).flatten(-2)), self.dropped)
        return x + self.last(hidden)


class _Model(nn.Module):
    def __init__(self, dropped: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(_Block(dropped) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


def _traced(model: nn.Module | None = None, **sizes: Any) -> Traced:
    options = Options.of(example=torch.zeros(SAMPLES, LENGTH, WIDTH), blockwise=sizes or None)
    return trace(model or _Model(), options)


def _block(**sizes: Any) -> Passes:
    return _traced(**sizes).blocks["layers.1"]


def test_what_is_ahead_of_attention_runs_twice_forward_and_all_of_it_again_backward() -> None:
    whole, spans = _block(), _block(layer_block=4)
    ahead, behind = 3, 2  # widths, of products with weights
    each = 2 * SAMPLES * LENGTH * WIDTH * WIDTH
    attention = whole.forward.attentions[0].flops
    assert whole.forward.flops == (ahead + behind) * each + attention
    assert spans.forward.flops == (2 * ahead + behind) * each + attention
    # from the output back to attention, after a forward; and once more to what is ahead of it, through attention
    assert spans.backward.flops == 2.5 * attention + (ahead + behind + 2 * behind + ahead + 2 * ahead) * each
    assert len(spans.forward.products) == 3 * 4  # four products in each of three spans


def test_of_a_block_its_input_and_what_attention_gave_are_kept() -> None:
    stream, sums = 4 * SAMPLES * LENGTH * WIDTH, 4 * SAMPLES * LENGTH * HEADS
    assert _block(layer_block=4).forward.saved_bytes == stream + stream + sums
    assert _block().forward.saved_bytes > _block(layer_block=4).forward.saved_bytes + 3 * stream


def test_masks_are_kept_where_another_mode_may_draw_and_only_there() -> None:
    stream = SAMPLES * LENGTH * WIDTH
    plain, drops = (_traced(_Model(share), layer_block=4).blocks["layers.1"].forward for share in (0.0, 0.5))
    assert drops.drawn == stream
    assert drops.saved_bytes == plain.saved_bytes  # they are drawn anew
    with BaseTorchFunctionMode():
        asked = _traced(_Model(0.5), layer_block=4).blocks["layers.1"].forward
    assert asked.saved_bytes == plain.saved_bytes + stream  # one byte each


@pytest.mark.parametrize("sizes", [{"layer_block": 4}, {"ffn_block": 6}])
def test_what_backward_runs_again_belongs_to_the_block_that_goes_back(sizes: dict[str, int]) -> None:
    model, example = lm("llama", num_hidden_layers=3)(), words(2, 12)
    whole, found = (trace(model, Options.of(example=example, blockwise=each)) for each in (None, sizes))
    assert found.after.backward.flops == whole.after.backward.flops
    assert found.before.backward.flops == whole.before.backward.flops
    for name, block in found.blocks.items():
        assert block.backward.flops > whole.blocks[name].backward.flops
        assert len(block.backward.attentions) == len(whole.blocks[name].backward.attentions)


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
def test_what_is_kept_and_at_work_is_the_peak_of_a_step_by_spans(family: str) -> None:
    build, batch = FAMILIES[family]
    model, options = build(), Options.of(example=batch(), blockwise={"layer_block": 4})
    step = first_footprint(model, Mesh(), options, plans=make_plans(model, Mesh(), options))
    found = trace(model, options)
    kept, made, peak = 0.0, 0.0, 0.0
    for each in (found.before, *found.blocks.values(), found.after):
        peak = max(peak, kept + each.forward.saved_bytes + each.forward.working_bytes)
        kept += each.forward.saved_bytes
    for each in reversed((found.before, *found.blocks.values(), found.after)):
        peak = max(peak, kept + made + each.backward.growing_bytes)
        kept, made = kept - each.forward.saved_bytes, made + each.made_bytes
    assert peak == pytest.approx(step.peak_bytes - step.states_bytes, rel=0.05)


def test_a_plan_by_shapes_is_the_proved_one() -> None:
    model, options = lm("llama", num_hidden_layers=2)(), Options.of(example=words(2, 12), blockwise={"layer_block": 4})
    proved, judged = (make_span_plan(model, options, shapes=shapes) for shapes in (False, True))
    assert proved is not None
    assert judged is not None
    assert judged.blocks.keys() == proved.blocks.keys()
    for path, each in proved.blocks.items():
        other = judged.blocks[path]
        assert (other.stream, other.kinds) == (each.stream, each.kinds)
        assert other.plan is not None
        assert each.plan is not None
        assert (other.plan.dealt, other.plan.attends) == (each.plan.dealt, each.plan.attends)
