"""A model that is asked to attend by blocks does, says where, and is the plain run."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import meshwright as mw
from meshwright.parallel.blockwise import install
from meshwright.parallel.blockwise.answer import attend_to
from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.blockwise.install import look
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.errors import WrapError
from tests.parallel.blockwise.unplugged import MODELS, Handwritten, by_hand, error_when_plugged, model_of
from tests.parallel.cells import layout_of, tiered
from tests.parallel.families import FAMILIES, lm, words
from tests.parallel.models import VOCABULARY

BLOCKS = {"query_block": 5, "kv_block": 4}  # divide no length in these tests


def _ids(length: int = 6) -> dict[str, Tensor]:
    ids = torch.arange(2 * length).reshape(2, length) % VOCABULARY
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("name", MODELS)
def test_attention_by_blocks_has_the_gradients_of_the_models_own(name: str) -> None:
    sizes = Blockwise(**BLOCKS)
    error, _ = error_when_plugged(*model_of(name), lambda call: attend_to(call, sizes))
    assert error < 1e-12


_PLAIN_LLAMA = (lm("llama", num_key_value_heads=2), words)
_Cell = tuple[Any, dict[str, int], dict[str, Any]]
_PARITY: list[_Cell] = [
    (_PLAIN_LLAMA, {"tp": 2}, {"sequence_parallel": True}),
    (_PLAIN_LLAMA, {"fsdp": 2}, {"schedule": "layered", "num_microbatches": 2, "recompute": "blocks"}),
    (MODELS["padded bert"], {"pp": 2}, {"schedule": "1f1b", "num_microbatches": 2}),
    (MODELS["packed gemma3"], {"dp": 2}, {"num_microbatches": 2}),
    (MODELS["gpt_oss"], {"tp": 2}, {}),
    (_PLAIN_LLAMA, {}, {}),
    (MODELS["padded t5"], {"tp": 2}, {"schedule": "layered", "num_microbatches": 2}),
    (MODELS["packed gemma3"], {"pp": 2}, {"schedule": "modular", "num_microbatches": 2}),
    (MODELS["deepseek_v3"], {"dp": 2}, {}),
    (MODELS["vit"], {"tp": 2}, {"loss": "sample_mean"}),
    (MODELS["swin"], {"dp": 2}, {"loss": "sample_mean"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "degrees", "options"), tiered(_PARITY, layout_of))
def test_on_ranks_it_is_the_plain_run(family: Any, degrees: dict[str, int], options: dict[str, Any]) -> None:
    report = mw.verify(*family, mw.Mesh(**degrees), blockwise=BLOCKS, **options)
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-11


def test_the_report_says_which_modules_attend_by_blocks() -> None:
    model = mw.parallelize(FAMILIES["t5"][0](), mw.Mesh(), blockwise=BLOCKS)
    assert model.report.notes[-1] == (
        "attention in blocks of 5 queries x 4 keys: 2 x encoder.block.*.layer.*.SelfAttention, "
        "2 x decoder.block.*.layer.*.SelfAttention, 2 x decoder.block.*.layer.*.EncDecAttention, by the attention "
        "interface of transformers"
    )


def test_the_report_says_after_the_first_step_what_no_example_told_before() -> None:
    model = mw.parallelize(Handwritten(by_hand, functional.scaled_dot_product_attention), mw.Mesh(), blockwise={})
    assert model.report.notes == ("attention by blocks: which modules is known after the first step, or with example=",)
    model.step(_ids())
    assert model.report.notes == (
        "attention in blocks of 1,024 queries x 1,024 keys: layers.1, by scaled_dot_product_attention",
        "attention not in blocks, since it is computed by hand: layers.0",
    )


_REFUSED = r"2 x layers\.\* of the model attend by hand \(product, softmax, product\).*or leave out blockwise="


def test_a_model_that_attends_by_hand_is_refused_when_it_is_wrapped() -> None:
    with pytest.raises(WrapError, match=_REFUSED):
        mw.parallelize(Handwritten(by_hand, by_hand), mw.Mesh(), blockwise={}, example=_ids())
    with pytest.raises(WrapError, match=r"bloom|h\.\*\.self_attention"):
        mw.parallelize(lm("bloom", n_layer=2, n_head=4)(), mw.Mesh(), blockwise={})


def test_a_model_that_attends_by_hand_is_refused_in_its_first_step_where_no_example_was_given() -> None:
    model = mw.parallelize(Handwritten(by_hand, by_hand), mw.Mesh(), blockwise={})
    with pytest.raises(WrapError, match=_REFUSED):
        model.step(_ids())


def test_a_model_without_attention_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with pytest.raises(WrapError, match="no module of the model attends; leave out blockwise="):
        mw.parallelize(model, mw.Mesh(), blockwise={}, example=torch.ones(2, 2), loss_fn=lambda output, _: output.sum())


def test_looking_changes_nothing() -> None:
    build_model, build_batch = FAMILIES["whisper"]
    model, batch = build_model(), build_batch()
    state, config = torch.get_rng_state(), model.config.to_dict()  # type: ignore[operator, union-attr]
    seen = look(model, lambda: model(**batch))
    assert len(seen.arrived) == 6
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == config  # type: ignore[operator, union-attr]
    assert model.training
    assert all(each.grad is None for each in model.parameters())


def test_a_deferred_model_is_looked_at_too() -> None:
    model = mw.parallelize(mw.deferred(FAMILIES["llama"][0]), mw.Mesh(), blockwise={})
    assert "2 x model.layers.*.self_attn" in model.report.notes[-1]


def test_evaluation_and_generation_go_by_blocks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[AttentionCall] = []
    monkeypatch.setattr(install, "attend_to", lambda call, sizes: calls.append(call) or attend_to(call, sizes))  # type: ignore[func-returns-value]
    plain = lm("llama", num_key_value_heads=2, use_cache=True)().eval()
    ids = words()["input_ids"][:2]
    expected = plain.generate(ids, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    model = mw.parallelize(plain, mw.Mesh(), blockwise=BLOCKS)
    calls.clear()
    loss, _ = model.evaluate({**words(), "use_cache": False})
    assert len(calls) == 2
    assert torch.equal(plain.generate(ids, max_new_tokens=4, do_sample=False), expected)  # type: ignore[operator]
    assert len(calls) == 2 + 4 * 2
    assert bool(loss.isfinite())
