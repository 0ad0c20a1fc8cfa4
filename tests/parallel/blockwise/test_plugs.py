"""Every attention call of an unmodified model arrives at a handler, whose answer the model goes on with."""

import copy
import gc
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from meshwright.parallel.blockwise.calls import AttentionCall, plug_of
from meshwright.parallel.blockwise.plugs import plug_in, plugged
from meshwright.parallel.capture import Flow, captured
from meshwright.parallel.errors import WrapError
from meshwright.parallel.guide import Backward
from tests.parallel.blockwise.unplugged import (
    MODELS,
    Handwritten,
    dense_attention,
    error_when_plugged,
    model_of,
    run,
    wide,
)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_attention_elsewhere_has_the_gradients_it_had(name: str) -> None:
    error, arrived = error_when_plugged(*model_of(name))
    assert arrived
    assert error < 1e-12


@pytest.mark.parametrize("name", ["padded llama", "padded bert", "gemma3", "padded t5", "packed gemma3", "gpt_oss"])
def test_masks_of_a_model_that_makes_none_itself_are_no_tensors(name: str) -> None:
    model, batch = model_of(name)
    calls: list[AttentionCall] = []
    with plugged(model, lambda call: calls.append(call) or dense_attention(call)):  # type: ignore[func-returns-value]
        run(model, batch)
    assert {type(call.mask).__name__ for call in calls} <= {"NoneType", "Band", "Padding", "Documents", "_Both"}


def test_a_call_says_who_asks_and_with_what() -> None:
    model, batch = model_of("gpt_oss")
    calls: list[AttentionCall] = []
    with plugged(model, lambda call: calls.append(call) or dense_attention(call)):  # type: ignore[func-returns-value]
        run(model, batch)
    first = calls[0]
    assert first.name == "model.layers.0.self_attn"
    assert first.module is model.get_submodule(first.name)
    assert (first.query.shape, first.key.shape) == ((9, 4, 12, 8), (9, 2, 12, 8))
    assert first.sinks is model.get_parameter("model.layers.0.self_attn.sinks")
    assert (first.scale, first.dropout_p, first.softcap) == (8**-0.5, 0.0, None)


def _refuse(call: AttentionCall) -> Tensor:
    raise AssertionError(f"{call.name} does not belong to the plugged model")


@pytest.mark.parametrize("name", ["gpt_oss", "padded llama", "translator"])
def test_another_model_of_the_process_is_not_touched(name: str) -> None:
    model, batch = model_of(name)
    other, _ = model_of(name)
    plain = run(other, wide(batch))
    with plugged(model, _refuse):
        assert all(torch.equal(each, plain[key]) for key, each in run(other, wide(batch)).items())
        with plugged(other, dense_attention), pytest.raises(AssertionError, match="does not belong"):
            run(model, wide(batch))
        assert all(torch.equal(each, plain[key]) for key, each in run(other, wide(batch)).items())


@pytest.mark.parametrize("name", ["gpt_oss", "padded llama"])
def test_a_model_that_shares_the_config_is_not_touched(name: str) -> None:
    model, batch = model_of(name)
    other = type(model)(model.config).double().eval()  # type: ignore[call-arg]
    plain = run(other, wide(batch))
    with plugged(model, _refuse):
        found = run(other, wide(batch))
    assert max(float((each - plain[key]).abs().max()) for key, each in found.items()) < 1e-12


def _state_of_the_process() -> list[Any]:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    registers = [dict(each._global_mapping) for each in (AttentionInterface, AttentionMaskInterface)]
    return [*registers, functional.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled]


def test_taking_a_plug_out_restores_everything() -> None:
    gc.collect()  # models of other tests
    model, batch = model_of("gpt_oss")  # has an implementation other than "sdpa"
    before, name = _state_of_the_process(), model.config._attn_implementation  # type: ignore[union-attr]
    plain = run(model, batch)
    for _ in range(2):
        inside = plug_in(model, dense_attention)
        assert _state_of_the_process() != before
        inside.remove()
        assert _state_of_the_process() == before
        assert model.config._attn_implementation == name  # type: ignore[union-attr]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(torch.equal(each, plain[key]) for key, each in run(model, batch).items())


def test_a_model_that_is_no_more_leaves_nothing_behind() -> None:
    gc.collect()  # models of other tests
    before = _state_of_the_process()
    for name in ("llama", "translator"):
        model, batch = model_of(name)
        plug_in(model, dense_attention)
        run(model, wide(batch))
        assert _state_of_the_process() != before
        del model
        gc.collect()
        assert _state_of_the_process() == before


@pytest.mark.parametrize("name", MODELS)
def test_a_model_stays_plugged_when_one_that_was_plugged_before_it_is_gone(name: str) -> None:
    gc.collect()
    before = _state_of_the_process()
    (first, batch), (second, _) = model_of(name), model_of(name)
    calls: list[AttentionCall] = []

    def noted(call: AttentionCall) -> Tensor:
        calls.append(call)
        return dense_attention(call)

    plug_in(first, dense_attention)
    with plugged(second, noted):
        run(second, wide(batch))
        number = len(calls)
        del first
        gc.collect()
        run(second, wide(batch))
        assert len(calls) == 2 * number > 0
    del second
    gc.collect()
    assert _state_of_the_process() == before


def test_a_model_is_plugged_once() -> None:
    model, _ = model_of("llama")
    with plugged(model, dense_attention):
        with pytest.raises(WrapError, match="goes somewhere already; remove that plug first"):
            plug_in(model, dense_attention)
        with pytest.raises(WrapError, match="attention of module layers goes"):  # a part of it
            plug_in(nn.ModuleDict({"layers": model.model.layers}), dense_attention)  # type: ignore[union-attr, dict-item]
    plug_in(model, dense_attention).remove()


def test_models_that_share_an_activation_are_plugged_at_once() -> None:
    shared = nn.ReLU()
    models = [nn.Sequential(nn.Linear(2, 2), shared) for _ in range(2)]
    with plugged(models[0], dense_attention) as plug:
        with plugged(models[1], dense_attention):
            assert plug_of(shared) is plug  # it may be attention that holds nothing
        assert plug_of(shared) is plug
    assert not any(vars(shared).keys() - vars(nn.ReLU()).keys())


@pytest.mark.parametrize("name", ["padded llama", "translator", "gpt_oss"])
def test_copies_of_a_model_and_its_config_are_not_plugged(name: str) -> None:
    model, batch = model_of(name)
    plain = run(model, wide(batch))
    with plugged(model, _refuse):
        mine = copy.deepcopy(model)
        found = run(mine, wide(batch))
        if hasattr(model, "config"):
            assert type(pickle.loads(pickle.dumps(model.config))) is type(model.config)
    assert max(float((each - plain[key]).abs().max()) for key, each in found.items()) < 1e-12


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "padded bert"])  # no cast inside of a block, which backward would not promote
def test_calls_arrive_again_where_a_model_recomputes(name: str, reentrant: bool) -> None:
    model, batch = model_of(name)
    plain = run(model, batch)
    model.train()  # or nothing is recomputed
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # has another name from 5.24 on
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    calls: list[str] = []
    with plugged(model, lambda call: calls.append(call.name) or dense_attention(call)):  # type: ignore[func-returns-value]
        found = run(model, batch)
    assert len(calls) == 2 * len(set(calls))
    assert max(float((each - plain[key]).abs().max()) for key, each in found.items()) < 1e-12


def test_calls_of_a_function_are_told_from_others_where_a_block_is_recomputed() -> None:
    model = Handwritten(functional.scaled_dot_product_attention, functional.scaled_dot_product_attention)
    ids = torch.arange(12).reshape(2, 6)
    calls: list[str] = []

    def forward(input_ids: Tensor) -> Tensor:
        x = model.table(input_ids)
        for layer in model.layers:
            x = x + checkpoint(layer, x, use_reentrant=False)  # type: ignore[operator]
        return x

    with plugged(model, lambda call: calls.append(call.name) or dense_attention(call)):  # type: ignore[func-returns-value]
        forward(ids).sum().backward()
    assert calls == ["layers.0", "layers.1", "layers.1", "layers.0"]


class _Guide:
    """Lets every block of one pass run, one stage for each."""

    def __init__(self, blocks: list[str]) -> None:
        self.stages = {block: number + 1 for number, block in enumerate(blocks)}
        self.first_stage = 0
        self.lacks = False

    def skips(self, block: str) -> Any:
        del block

    def completed(self, block: str, arguments: Any) -> Any:
        del block
        return arguments

    def gave(self, block: str, output: Any) -> None: ...


def test_calls_arrive_from_passes_that_take_turns() -> None:
    model = Handwritten(functional.scaled_dot_product_attention, functional.scaled_dot_product_attention).double()
    ids = torch.arange(24).reshape(2, 2, 6)
    blocks = {f"layers.{number}": layer for number, layer in enumerate(model.layers)}
    with torch.no_grad():
        plain = [model(part, part) for part in ids]
        seen: list[str] = []
        with (
            plugged(model, lambda call: seen.append(call.name) or dense_attention(call)),  # type: ignore[func-returns-value]
            captured(blocks),
        ):
            flows = [Flow(partial(model, part, part), _Guide(list(blocks)), Backward()) for part in ids]
            for stage in range(3):
                for flow in flows:
                    flow.resume(stage)
    assert seen == ["layers.0", "layers.0", "layers.1", "layers.1"]
    assert all(torch.allclose(flow.result, each, rtol=1e-14) for flow, each in zip(flows, plain, strict=True))


def test_attention_weights_cannot_be_given_back() -> None:
    model, batch = model_of("llama")
    with (
        plugged(model, dense_attention),
        pytest.raises(WrapError, match="output_attentions asks for attention weights"),
    ):
        model(**batch, output_attentions=True)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    model.config.output_attentions = True  # type: ignore[union-attr]
    with pytest.raises(WrapError, match="output_attentions asks for attention weights"):
        plug_in(model, dense_attention)
    model.config.output_attentions = False  # type: ignore[union-attr]
    plug_in(model, dense_attention).remove()
