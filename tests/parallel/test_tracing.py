"""A model on shapes does what it does: products, attention, bytes kept; equal blocks run once."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.parallel.errors import WrapError
from meshwright.parallel.fake_rank import first_footprint
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.options import Options
from meshwright.parallel.plan import Plans, make_plan
from meshwright.parallel.traced_attention import Shared
from meshwright.parallel.traced_blocks import alike_blocks
from meshwright.parallel.tracing import trace
from meshwright.parallel.work import Sent, Traced
from tests.parallel.families import FAMILIES, lm, words
from tests.parallel.models import VOCABULARY

WITHOUT_DROPOUT = ("qwen3", "olmo2", "modernbert", "gpt_neox")


def _traced(family: str, **how: Any) -> Traced:
    build, batch = FAMILIES[family]
    return trace(build(), Options(example=batch()), **how)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "t5", "vit", "whisper", "translator", "mixer"])
def test_backward_multiplies_twice_what_forward_does(family: str) -> None:
    found = _traced(family)
    for each in found.blocks.values():
        assert len(each.backward.products) == 2 * len(each.forward.products) > 0
        assert len(each.backward.attentions) == len(each.forward.attentions)
        assert each.forward.saved_bytes > each.input_bytes > 0
        assert each.forward.moved_bytes > 0


@pytest.mark.parametrize("family", WITHOUT_DROPOUT)
def test_what_is_kept_and_at_work_is_the_peak_of_the_step(family: str) -> None:
    build, batch = FAMILIES[family]
    model, options = build(), Options(example=batch())
    step, found = first_footprint(model, Mesh(), options, plans=Plans()), trace(model, options)
    every = [found.before, *found.blocks.values(), found.after]
    kept, peak = 0.0, 0.0
    for each in every:
        peak = max(peak, kept + each.forward.saved_bytes + each.forward.working_bytes)
        kept += each.forward.saved_bytes
    for each in reversed(every):
        peak = max(peak, kept + each.backward.working_bytes)
        kept -= each.forward.saved_bytes
    scores = 4 * batch()["input_ids"].numel() * VOCABULARY  # which the engine may still hold when they go back
    real = step.peak_bytes - step.states_bytes
    assert real <= peak + scores
    assert peak <= 1.005 * real  # the engine lets go of its counts of items a little earlier


def test_equal_blocks_run_once_and_give_what_single_runs_give() -> None:
    two, many = (trace(lm("qwen3", num_hidden_layers=number)(), Options(example=words())) for number in (2, 6))
    assert len(many.blocks) == 6
    assert len({id(each) for each in many.blocks.values()}) == 1
    assert many.blocks["model.layers.5"] == two.blocks["model.layers.1"]
    assert (many.before, many.after) == (two.before, two.after)


def test_blocks_that_differ_in_a_setting_are_not_equal() -> None:
    class Block(nn.Module):
        def __init__(self, index: int, window: int | None) -> None:
            super().__init__()
            self.index, self.window, self.line = index, window, nn.Linear(4, 4)

    blocks = {str(index): Block(index, None if index % 2 else 8) for index in range(4)}
    assert alike_blocks(blocks).first == {"0": "0", "1": "1", "2": "0", "3": "1"}
    assert alike_blocks(blocks, apart=["2"]).first["2"] == "2"


class _Attends(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.project = causal, nn.Linear(8, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).view(2, 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind()
        made = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return functional.dropout(made, 0.1).pow(2).sum()


def test_attention_is_fused_and_causal_attention_is_half_of_it() -> None:
    whole, half = (trace(_Attends(causal), Options(example=torch.zeros(2, 4, 8))).before for causal in (False, True))
    (attention,), (causal,) = whole.forward.attentions, half.forward.attentions
    assert (attention.flops, attention.scores) == (4 * 2 * 2 * 4 * 4 * 4, 2 * 2 * 4 * 4)
    assert causal.flops == attention.flops / 2
    assert whole.backward.attentions[0].flops == 2.5 * attention.flops
    elements = 2 * 2 * 4 * 4  # query, key, value (one product), output, a number a query, a mask of one byte, the rest
    assert whole.forward.saved_bytes == 4 * (3 + 1 + 1) * elements + 4 * elements // 4 + elements


def test_keys_of_other_ranks_cost_their_share_of_attention_and_their_way() -> None:
    options = Options(example=torch.zeros(2, 4, 8))

    def fetched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[list[Sent], list[Sent]]:
        assert query.shape == key.shape == value.shape
        return [Sent("cp", "hop", float(key.numel()))], [Sent("cp", "hop", 1.0), Sent("cp", "hop", 2.0)]

    alone, among = trace(_Attends(True), options), trace(_Attends(True), options, shared=Shared(4, fetched))
    assert among.before.forward.attentions[0].flops == 4 * alone.before.forward.attentions[0].flops
    assert [each.size_bytes for each in among.before.forward.sent] == [2 * 4 * 8]
    assert [each.size_bytes for each in among.before.backward.sent] == [1.0, 2.0]
    assert not alone.before.forward.sent


@pytest.mark.parametrize("sequence", [False, True])
def test_the_first_rank_of_tp_sends_what_the_plan_says(sequence: bool) -> None:
    model, mesh = lm("qwen3", num_key_value_heads=2, num_hidden_layers=4)(), Mesh(tp=2)
    options = Options(example=words(8, 12), sequence_parallel=sequence, loss="sum")
    plan = make_plan(model, mesh, options)
    found = trace(model, options, plan=plan)
    every = [found.before, *found.blocks.values(), found.after]
    sent = [(each.kind, each.size_bytes) for one in every for each in (*one.forward.sent, *one.backward.sent)]
    told = [(kind, 4 * elements) for calls in plan.calls.values() for kind, elements in calls]
    assert Counter(sent) == Counter(told)
    whole = trace(model, options)
    ratio = found.blocks["model.layers.1"].forward.flops / whole.blocks["model.layers.1"].forward.flops
    assert ratio == pytest.approx(0.5, abs=0.01)


def test_a_plan_judged_by_shapes_is_the_proved_one() -> None:
    model, mesh = lm("llama", num_key_value_heads=2, num_hidden_layers=3)(), Mesh(tp=2)
    options = Options(example=words())
    proved, judged = (make_plan(model, mesh, options, shapes=shapes) for shapes in (False, True))
    assert (judged.splits, judged.rows, judged.columns) == (proved.splits, proved.rows, proved.columns)
    assert judged.calls == proved.calls


def test_a_model_that_asks_for_values_is_refused_with_its_words() -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0].sum()

    with pytest.raises(WrapError, match="cannot be run on shapes: DynamicOutputShape"):
        trace(Asks(), Options(example=torch.zeros(3)))
    with pytest.raises(WrapError, match="no example"):
        trace(Asks(), Options())


def test_the_model_is_left_as_it_was() -> None:
    build, batch = FAMILIES["qwen3"]
    model = build()
    kinds, gradients = [type(each) for each in model.modules()], [each.grad for each in model.parameters()]
    trace(model, Options(example=batch()), precision=torch.bfloat16)
    assert [type(each) for each in model.modules()] == kinds
    assert [each.grad for each in model.parameters()] == gradients
    assert "forward" not in vars(model)


def test_what_is_not_traced_is_refused_by_name() -> None:
    with pytest.raises(WrapError, match="ask for data_engine='torch'"):
        trace(FAMILIES["gpt2"][0](), Options.of(example=words(2, 8), data_engine="deepspeed"))
