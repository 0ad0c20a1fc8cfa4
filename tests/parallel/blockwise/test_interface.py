"""Masks that models of transformers ask for are those that "sdpa" and "eager" make."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as made
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from meshwright.parallel.blockwise.mask_tensor import MaskTensor
from meshwright.parallel.blockwise.plugs import plugged
from tests.parallel.blockwise.unplugged import dense_attention, model_of

BATCH = 2


def _padding(length: int, hidden: int) -> Tensor:
    return torch.arange(length) < torch.tensor([[length], [length - hidden]])


_ASKED: dict[str, dict[str, Any]] = {
    "causal": {},
    "one query": {"q_length": 1, "q_offset": 5},
    "after a cache": {"q_length": 3, "q_offset": 3},
    "after a cache in a window": {
        "q_length": 3,
        "q_offset": 3,
        "kv_offset": 2,
        "kv_length": 4,
        "mask_function": made.sliding_window_causal_mask_function(3),
        "local_size": 3,
    },
    "an offset that is a tensor": {"q_length": 3, "q_offset": torch.tensor(3)},
    "window": {"mask_function": made.sliding_window_causal_mask_function(3), "local_size": 3},
    "wide window": {"mask_function": made.sliding_window_causal_mask_function(9), "local_size": 9},
    "no padding": {"attention_mask": _padding(6, 0)},
    "padding": {"attention_mask": _padding(6, 2)},
    "padding of more keys": {"attention_mask": _padding(9, 4)},
    "padding of fewer keys": {"attention_mask": _padding(4, 2)},
    "padding after an offset": {"attention_mask": _padding(9, 4), "kv_offset": 2, "q_offset": 2},
    "both ways": {"mask_function": made.bidirectional_mask_function, "allow_is_causal_skip": False},
    "both ways, skipped": {
        "mask_function": made.bidirectional_mask_function,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": True,
    },
    "both ways, padded": {
        "mask_function": made.bidirectional_mask_function,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": True,
        "attention_mask": _padding(6, 2),
    },
    "across": {
        "mask_function": made.bidirectional_mask_function,
        "allow_is_causal_skip": False,
        "q_length": 9,
        "attention_mask": _padding(6, 2),
    },
    "one by one": {"mask_function": lambda b, h, q, k: k <= q + 1, "use_vmap": True, "allow_is_causal_skip": False},
    "never skipped": {"allow_is_causal_skip": False},
}


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize("asked", _ASKED)
def test_a_mask_is_the_one_that_the_implementation_before_made(asked: str, before: str) -> None:
    model, _ = model_of("llama")
    model.set_attn_implementation(before)  # type: ignore[operator]
    config: Any = model.config
    given = {
        "batch_size": BATCH,
        "q_length": 6,
        "kv_length": 6,
        "mask_function": made.causal_mask_function,
        "dtype": torch.float64,
        "device": "cpu",
        **_ASKED[asked],
    }
    expected = MASKS[before](**given, config=config)
    with plugged(model, dense_attention):
        found = MASKS[config._attn_implementation](**given, config=config)
        plain = MASKS[config._attn_implementation](**given, config=model_of("llama")[0].config)
    assert not isinstance(plain, MaskTensor)  # of another model
    if expected is None:
        assert found is None
        return
    assert isinstance(found, MaskTensor)
    assert found._shared.made is None
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(found.values(), expected)


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", [{}, {"is_causal": False}, {"is_causal": True}], ids=str)
def test_no_mask_means_what_it_meant_to_the_implementation_before(before: str, settings: dict[str, Any]) -> None:
    from transformers.models.llama.modeling_llama import eager_attention_forward

    model, _ = model_of("llama")
    model.set_attn_implementation(before)  # type: ignore[operator]
    module: Any = model.get_submodule("model.layers.0.self_attn")
    query, key = torch.randn(2, 4, 5, 8, dtype=torch.float64), torch.randn(2, 2, 5, 8, dtype=torch.float64)

    def attended() -> Tensor:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
        output: Tensor = attend(module, query, key, key, None, scaling=0.3, **settings)[0]
        return output

    expected = attended()
    with plugged(model, dense_attention) as plug:
        torch.testing.assert_close(attended(), expected, rtol=1e-6, atol=1e-6)  # softmax in float32 under eager
    assert list(plug.arrived) == ["model.layers.0.self_attn"]


def test_the_config_says_what_it_said_where_it_is_written_or_copied() -> None:
    import copy

    model, _ = model_of("gpt_oss")
    config: Any = model.config
    with plugged(model, dense_attention):
        assert config._attn_implementation == "sdpa"
        assert copy.deepcopy(config)._attn_implementation == "eager"
        assert "attn_implementation" not in config.to_json_string()
    assert config._attn_implementation == "eager"
