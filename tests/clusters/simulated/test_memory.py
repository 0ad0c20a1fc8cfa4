"""Memory by cause: the formulas of Korthikanti et al., states by ZeRO stage, published runs."""

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.simulate import RUNS, report
from meshwright.clusters.simulated import Engine, Memory, memory
from meshwright.clusters.simulated.memory import activation_bytes
from tests.clusters.simulated.settings import GPT_175B, LLAMA_405B, setting

PLAIN = Engine(fused_attention=False, overlapped=False, stops_early=False)
S, B, H, A = 2048, 1, 12288, 96


def _of(**layout: Any) -> float:
    return activation_bytes(setting(GPT_175B, "A100", PLAIN, **layout))


def _memory(**layout: Any) -> Memory:
    return memory(setting(GPT_175B, "A100", PLAIN, **({"tp": 8, "pp": 8, "global_batch": 64} | layout)))


@pytest.mark.parametrize("t", [1, 2, 8])
def test_activations_of_a_layer_are_the_formulas_of_korthikanti(t: int) -> None:
    """Table 2 of arXiv 2205.05198."""
    assert _of(tp=t) == pytest.approx(S * B * H * (10 + 24 / t + 5 * A * S / (H * t)))
    assert _of(tp=t, sequence_parallel=True) == pytest.approx(S * B * H / t * (34 + 5 * A * S / H))
    assert _of(tp=t, recompute="selective") == pytest.approx(S * B * H * (10 + 24 / t))
    assert _of(tp=t, sequence_parallel=True, recompute="selective") == pytest.approx(S * B * H / t * 34)
    assert _of(tp=t, recompute="full") == pytest.approx(2 * S * B * H)


def test_fused_attention_keeps_no_scores_and_context_parallelism_a_part_of_the_positions() -> None:
    fused = setting(GPT_175B, "A100", Engine())
    assert activation_bytes(fused) == 34 * S * H
    assert activation_bytes(setting(GPT_175B, "A100", Engine(), cp=4)) == 34 * S * H / 4


def test_interleaving_keeps_one_plus_p_less_one_over_p_v() -> None:
    """Section 4.2.3 there."""
    plain, interleaved = _memory(), _memory(vpp=3)
    assert plain.activations_bytes == pytest.approx(96 * _of(tp=8))
    assert interleaved.activations_bytes == pytest.approx(96 * _of(tp=8) * (1 + 7 / (8 * 3)))


def test_breadth_first_keeps_all_micro_batches() -> None:
    kept = [_memory(schedule=schedule).activations_bytes for schedule in ("1f1b", "breadth-first")]
    assert kept[1] == pytest.approx(64 / 8 * kept[0])


def test_sharded_layers_of_a_stage_are_gathered_together_where_micro_batches_go_through_it_one_by_one() -> None:
    of = {"dp": 8, "global_batch": 512, "zero_stage": 3}
    layer = 4 * GPT_175B.layer_parameters / 8
    assert _memory(**of).weights_bytes == layer
    assert _memory(**of, schedule="breadth-first", vpp=12).weights_bytes == layer
    assert _memory(**of, schedule="breadth-first", vpp=4).weights_bytes == 3 * layer
    assert _memory(**{**of, "pp": 1}, schedule="breadth-first").weights_bytes == layer


def test_states_are_eighteen_bytes_of_a_parameter_and_dealt_by_stage() -> None:
    whole = {stage: _memory(dp=8, global_batch=512, zero_stage=stage) for stage in range(4)}
    mine = whole[0].weights_bytes / 2
    assert whole[0].optimizer_bytes == 12 * mine
    assert whole[1].optimizer_bytes == 12 * mine / 8
    assert whole[1].gradients_bytes == whole[0].gradients_bytes
    assert whole[2].gradients_bytes == whole[0].gradients_bytes / 8
    assert whole[3].weights_bytes < whole[2].weights_bytes
    totals = [whole[stage].total_bytes for stage in range(4)]
    assert totals == sorted(totals, reverse=True)


def test_sixteen_bit_sums_of_gradients_cost_the_optimizer_their_wide_copies() -> None:
    narrow = memory(setting(GPT_175B, "A100", replace(PLAIN, gradient_bytes=2), tp=8, pp=8, dp=2, zero_stage=1))
    wide = memory(setting(GPT_175B, "A100", PLAIN, tp=8, pp=8, dp=2, zero_stage=1))
    mine = narrow.weights_bytes / 2
    assert narrow.optimizer_bytes - wide.optimizer_bytes == 4 * mine / 2
    assert wide.gradients_bytes - narrow.gradients_bytes == 4 * mine


def test_causes_add_up_and_each_kind_of_recomputation_keeps_less() -> None:
    found = [_memory(recompute=how) for how in ("none", "selective", "full")]
    for each in found:
        assert each.total_bytes == pytest.approx(sum(vars(each).values()))
        assert each.tensor_bytes == each.total_bytes - each.fragmentation_bytes - each.overhead_bytes
        assert each.state_bytes < each.tensor_bytes
    assert [each.activations_bytes for each in found] == sorted((e.activations_bytes for e in found), reverse=True)


@pytest.mark.parametrize("axis", ["tp", "cp", "pp"])
def test_dealing_a_model_further_never_needs_more(axis: str) -> None:
    layout = {"tp": 2, "cp": 2, "pp": 2, "dp": 4, "global_batch": 256, "sequence_parallel": True, "zero_stage": 1}
    totals = [memory(setting(LLAMA_405B, "H100", **(layout | {axis: degree}))).total_bytes for degree in (2, 4, 8)]
    assert totals == sorted(totals, reverse=True)


def test_memory_of_published_runs_is_met() -> None:
    assert report(RUNS)["memory_median_error_percent"] < 5
