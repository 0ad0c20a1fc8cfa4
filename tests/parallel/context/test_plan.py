"""A plan of dealt sequences moves and joins as plans of tensors do."""

from meshwright.parallel.context.plan import Attends, ContextPlan

BLOCK = ContextPlan(
    degree=2,
    sequence=True,
    dealt={"": (("position_embeddings", (-2, -2)),)},
    entered={"": (2,)},
    attends={"self_attn": Attends(True, 4, 2, 8)},
    partial=frozenset({"norm.weight"}),
)


def test_a_plan_moved_under_a_path_names_everything_there() -> None:
    moved = BLOCK.under("layers.1")
    assert moved.dealt == {"layers.1": BLOCK.dealt[""]}
    assert moved.entered == {"layers.1": (2,)}
    assert moved.attends == {"layers.1.self_attn": BLOCK.attends["self_attn"]}
    assert moved.partial == {"layers.1.norm.weight"}


def test_plans_of_blocks_join_to_one() -> None:
    whole = ContextPlan(degree=4, sequence=True).joined_with(BLOCK.under(f"layers.{number}") for number in range(2))
    assert whole.degree == 4
    assert list(whole.attends) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert whole.partial == {"layers.0.norm.weight", "layers.1.norm.weight"}
