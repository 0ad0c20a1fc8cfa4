"""A transformer as numbers: parameters and FLOPs are the closed formulas of the papers."""

import pytest

from meshwright.clusters.simulated.model import Transformer
from meshwright.parallel.work import Product

GPT = {"layers": 12, "hidden": 512, "heads": 8, "kv_heads": 8, "ffn": 2048, "vocab": 1024, "sequence": 256}
LLAMA_8B = Transformer(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, sequence=8192, gated=True)


def _gpt(**changed: int) -> Transformer:
    return Transformer(**{**GPT, **changed}, tied=True)


def _matrices(model: Transformer) -> int:
    return model.layers * (model.attention_parameters + model.expert_parameters) + model.embedding_parameters


@pytest.mark.parametrize("hidden", [256, 512, 4096])
def test_flops_of_a_token_are_6_n_and_12_l_h_s(hidden: int) -> None:
    model = _gpt(hidden=hidden, ffn=4 * hidden)
    scores = 12 * model.layers * hidden * model.sequence
    assert model.flops_per_token() == pytest.approx(6 * _matrices(model) + scores, rel=1e-12)


def test_below_the_diagonal_are_half_of_the_scores() -> None:
    model = _gpt()
    less = model.flops_per_token() - model.flops_per_token(causal=True)
    assert less == 6 * model.layers * model.hidden * model.sequence


def test_flops_with_recomputation_are_the_formula_of_narayanan() -> None:
    model = _gpt()
    h, s, layers, v = model.hidden, model.sequence, model.layers, model.vocab
    formula = 96 * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    assert s * model.flops_per_token(recompute=True) == pytest.approx(formula, rel=1e-12)


def test_parameters_are_those_of_published_models() -> None:
    assert LLAMA_8B.parameters == 8_030_261_248
    gpt3 = _gpt(layers=96, hidden=12288, heads=96, kv_heads=96, ffn=49152, vocab=51200, sequence=2048)
    assert gpt3.parameters == pytest.approx(174.6e9, rel=1e-3)


def test_experts_count_once_as_parameters_and_top_k_times_as_flops() -> None:
    sparse, dense = _gpt(experts=8, top_k=2), _gpt()
    assert sparse.layer_parameters - dense.layer_parameters == 7 * dense.expert_parameters + 8 * dense.hidden
    assert sparse.layer_flops() - dense.layer_flops() == 2 * dense.expert_parameters


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_products_of_all_ranks_are_those_of_the_layer(tp: int) -> None:
    model = LLAMA_8B
    products = [*model.linear_products(8192, tp), *model.score_products(1, 8192, tp)]
    assert tp * sum(each.flops for each in products) == 8192 * model.layer_flops()


def test_a_product_moves_each_operand_once() -> None:
    assert Product(3, 5, 7, batch=2).bytes() == 2 * 2 * (3 * 7 + 7 * 5 + 3 * 5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"layers": 0}, "positive"),
        ({"kv_heads": 3}, "8 query heads do not share 3"),
        ({"experts": 4}, "top_k of the experts: 0 of 4"),
        ({"experts": 2, "top_k": 3}, "3 of 2"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changed: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _gpt(**changed)
