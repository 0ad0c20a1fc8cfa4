"""Families unlike those of the parity matrix: equal to the plain run on each axis, or refused with the reason."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import meshwright as mw
from meshwright.parallel.errors import WrapError
from tests.parallel.cells import tiered
from tests.parallel.families import SHAPE, SPECIAL, Family, made, words
from tests.parallel.models import VOCABULARY, causal_lm


def _masked() -> dict[str, Tensor]:
    """Rows that are padded at their ends."""
    batch = words()
    mask = torch.ones_like(batch["input_ids"])
    mask[2, 7:], mask[5, 3:] = 0, 0
    return {**batch, "labels": batch["labels"].masked_fill(mask == 0, -100), "attention_mask": mask}


def _originals() -> dict[str, Tensor]:
    """A yes or no for each token."""
    ids = words()["input_ids"]
    return {"input_ids": ids, "labels": ids % 2}


def _pictures() -> dict[str, Tensor]:
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": images, "labels": torch.arange(6) % 5}


_BOTH = {
    f"{side}_{name}": number for side in ("encoder", "decoder") for name, number in (("layers", 2), ("ffn_dim", 64))
}
_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
MODELS: dict[str, Family] = {
    "mamba": (causal_lm("mamba", vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=3), words),
    "mamba2": (
        causal_lm(
            "mamba2",
            **{"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "num_heads": 4},
            **{"head_dim": 16, "n_groups": 2, "chunk_size": 4},
        ),
        words,
    ),
    "roberta": (
        made("RobertaForMaskedLM", "RobertaConfig", **SHAPE, max_position_embeddings=40, pad_token_id=1),
        _masked,
    ),
    "albert": (made("AlbertForMaskedLM", "AlbertConfig", **SHAPE, embedding_size=16), words),
    "albert in groups": (
        made("AlbertForMaskedLM", "AlbertConfig", **SHAPE, num_hidden_groups=2, inner_group_num=2, embedding_size=16),
        words,
    ),
    "electra": (made("ElectraForPreTraining", "ElectraConfig", **SHAPE, embedding_size=16), _originals),
    "deberta_v2": (
        made(
            "DebertaV2ForMaskedLM",
            "DebertaV2Config",
            **SHAPE,
            **{"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_position_embeddings": 64},
            **{"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3},
        ),
        words,
    ),
    "bart": (
        made(
            "BartForConditionalGeneration",
            "BartConfig",
            **{"d_model": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "use_cache": False},
            **{**_BOTH, **_HEADS, **SPECIAL},
        ),
        words,
    ),
    "swin": (
        made(
            "SwinForImageClassification",
            "SwinConfig",
            **{"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]},
            **{"window_size": 4, "num_labels": 5},
        ),
        _pictures,
    ),
    "convnext": (
        made(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            **{"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2, "image_size": 32, "num_labels": 5},
        ),
        _pictures,
    ),
}
_LAYOUTS: tuple[tuple[dict[str, int], dict[str, Any]], ...] = (
    ({"tp": 2}, {}),
    ({"fsdp": 2}, {"zero_stage": 3, "num_microbatches": 2}),
    ({"pp": 2}, {"schedule": "modular", "num_microbatches": 2}),
    ({"cp": 2}, {}),
    ({"tp": 2}, {"sequence_parallel": True}),
    ({"pp": 2, "tp": 2}, {"schedule": "modular", "num_microbatches": 2}),
)
_REFUSED = {  # of a model under the first of these words that its layout has
    "mamba": {"sequence_parallel": r"nothing in backbone.layers.\* can be dealt"},
    "mamba2": {"sequence_parallel": "block backbone.layers.0 cannot work on a dealt sequence"},
    "albert": {
        "sequence_parallel": "no list of blocks",
        "cp": "no list of blocks",
        "pp": r"no list of repeated blocks; name them with blocks=",
    },
    "albert in groups": {"sequence_parallel": "cannot work on a dealt sequence"},
    "swin": {"sequence_parallel": "cannot work on a dealt sequence", "cp": "does not work on a dealt sequence"},
    "convnext": {"sequence_parallel": "cannot work on a dealt sequence", "cp": "does not work on a dealt sequence"},
}


def _refusal(name: str, layout: tuple[dict[str, int], dict[str, Any]]) -> str | None:
    found = _REFUSED.get(name, {})
    return next((found[word] for word in found if word in {**layout[0], **layout[1]}), None)


_CELLS = list(product(MODELS, _LAYOUTS))
Layout = tuple[dict[str, int], dict[str, Any]]


def _run(name: str, layout: Layout) -> mw.ParityReport:
    build_model, build_batch = MODELS[name]
    return mw.verify(build_model, build_batch, mw.Mesh(**layout[0]), **layout[1])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), tiered(each for each in _CELLS if not _refusal(*each)), ids=str)
def test_a_family_is_the_plain_run_on_each_axis(name: str, layout: Layout) -> None:
    report = _run(name, layout)
    assert report.ok, report
    assert report.notes == ()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), [each for each in _CELLS if _refusal(*each)], ids=str)
def test_an_axis_that_a_family_cannot_have_is_refused_with_the_reason(name: str, layout: Layout) -> None:
    with pytest.raises(WrapError, match=_refusal(name, layout)):
        _run(name, layout)
