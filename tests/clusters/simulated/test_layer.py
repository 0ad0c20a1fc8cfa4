"""One layer of one micro-batch, by cause."""

from dataclasses import replace

import pytest

from meshwright.clusters.simulated import Engine, Training
from meshwright.clusters.simulated.layer import elementwise_bytes, head_s, layer_times, score_bytes
from tests.clusters.simulated.settings import GPT_175B, LLAMA_405B, setting

PLAIN = Engine(fused_attention=False, overlapped=False, stops_early=False)


def test_scores_in_memory_are_thirteen_bytes_each_and_dealt_over_heads() -> None:
    assert score_bytes(setting(micro_batch=2)) == 13 * 2 * 96 * 2048**2
    assert score_bytes(setting(micro_batch=2, tp=8)) == 13 * 2 * 12 * 2048**2


def test_a_layer_between_products_moves_the_whole_width_unless_positions_are_dealt() -> None:
    h, f, tokens = 12288, 49152, 2048
    assert elementwise_bytes(setting()) == tokens * (22 * h + 12 * h + 4 * f)
    assert elementwise_bytes(setting(tp=8)) == tokens * (22 * h + (12 * h + 4 * f) / 8)
    assert elementwise_bytes(setting(tp=8, sequence_parallel=True)) == elementwise_bytes(setting()) / 8


def test_backward_takes_about_twice_as_long_as_forward() -> None:
    times = layer_times(setting(micro_batch=4, tp=8, engine=PLAIN))
    assert times.backward_s / times.forward_s == pytest.approx(2.0, abs=0.2)


def test_fused_attention_multiplies_five_times_backward_and_two_forward() -> None:
    long = replace(GPT_175B, sequence=2**20)
    times = layer_times(setting(long, tp=8))
    assert 2.2 < times.backward_s / times.forward_s < 2.5


def test_wider_sums_of_gradients_move_more() -> None:
    narrow, wide = (layer_times(setting(engine=replace(PLAIN, gradient_bytes=each))) for each in (2, 4))
    assert narrow.forward_s == pytest.approx(wide.forward_s)
    assert narrow.backward_s < wide.backward_s


def test_recomputing_all_takes_a_forward_and_stopping_early_spares_its_last_product() -> None:
    whole = layer_times(setting(recompute="full", micro_batch=4, engine=PLAIN))
    early = layer_times(setting(recompute="full", micro_batch=4, engine=replace(PLAIN, stops_early=True)))
    assert whole.recompute_s == pytest.approx(whole.forward_s)
    assert 0.6 < early.recompute_s / whole.recompute_s < 0.75
    assert layer_times(setting(engine=PLAIN)).recompute_s == 0.0


def test_recomputing_what_is_cheap_costs_little() -> None:
    for engine in (PLAIN, Engine()):
        times = layer_times(setting(recompute="selective", micro_batch=4, engine=engine))
        assert 0 < times.recompute_s < 0.2 * times.forward_s


def test_collectives_of_tp_are_four_all_reduces_and_six_with_recomputation() -> None:
    assert layer_times(setting()).tp_s == 0.0
    plain = layer_times(setting(tp=8, micro_batch=4, engine=PLAIN))
    again = layer_times(setting(tp=8, micro_batch=4, recompute="full", engine=PLAIN))
    assert again.tp_s / plain.tp_s == pytest.approx(1.5, rel=0.01)
    hidden = layer_times(setting(tp=8, micro_batch=4, engine=replace(PLAIN, overlapped_tp=True)))
    assert hidden.tp_s < plain.tp_s


def test_keys_go_round_only_where_sequences_are_dealt() -> None:
    assert layer_times(setting(LLAMA_405B, "H100")).cp_s == 0.0
    assert layer_times(setting(LLAMA_405B, "H100", cp=8)).cp_s > 0.0


def test_rows_go_to_experts_only_where_those_are_dealt() -> None:
    sparse = replace(LLAMA_405B, hidden=4096, heads=32, ffn=2048, experts=64, top_k=4)
    alone = layer_times(setting(sparse, "H100", dp=8))
    dealt = layer_times(setting(sparse, "H100", dp=8, ep=8))
    assert (alone.ep_s, dealt.ep_s > 0) == (0.0, True)


def test_every_cause_grows_with_the_micro_batch() -> None:
    def times(micro_batch: int) -> dict[str, float]:
        return vars(layer_times(setting(tp=8, cp=2, recompute="full", micro_batch=micro_batch, engine=PLAIN)))

    one, two = times(2), times(4)
    assert all(two[name] > one[name] for name in one if one[name])


@pytest.mark.parametrize("vocabulary", [0, 1000, 128256])
def test_the_head_is_as_wide_as_the_vocabulary(vocabulary: int) -> None:
    def of(training: Training) -> float:
        return head_s(training)

    small = of(setting(replace(GPT_175B, vocab=vocabulary)))
    assert (small == 0.0) == (vocabulary == 0)
    assert of(setting(replace(GPT_175B, vocab=vocabulary + 10_000))) > small
