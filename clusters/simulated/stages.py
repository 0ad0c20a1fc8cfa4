"""Which layers a stage of a pipeline has, and what parameters one rank of it holds."""

from meshwright.clusters.simulated.layout import Layout
from meshwright.clusters.simulated.model import Transformer

__all__ = ["largest_stage", "layers_of_ranks", "stage_parameters"]


def layers_of_ranks(model: Transformer, pp: int) -> tuple[int, ...]:
    """Layers of each rank of a pipeline.

    Where they do not deal evenly but would with the embedding and the head as layers of their own, those count as such;
    else the first ranks have one more.

    >>> small = Transformer(layers=6, hidden=8, heads=1, kv_heads=1, ffn=32, vocab=10, sequence=4)
    >>> layers_of_ranks(small, 3), layers_of_ranks(small, 4), layers_of_ranks(small, 5)
    ((2, 2, 2), (1, 2, 2, 1), (2, 1, 1, 1, 1))
    """
    whole, over = divmod(model.layers, pp)
    if over and (model.layers + 2) % pp == 0:
        each = (model.layers + 2) // pp
        return (each - 1, *[each] * (pp - 2), each - 1)
    return tuple(whole + (rank < over) for rank in range(pp))


def largest_stage(model: Transformer, layout: Layout, *, head_in_layers: float) -> tuple[int, bool]:
    """Layers of the rank that takes longest, and whether the head is with them.

    Args:
        model: what is dealt.
        layout: to how many ranks.
        head_in_layers: time of the head over that of a layer.
    """
    layers = layers_of_ranks(model, layout.pp)
    last = layers[-1] + head_in_layers
    return (layers[-1], True) if last >= max(layers) else (max(layers), False)


def stage_parameters(model: Transformer, layout: Layout) -> float:
    """Parameters of one rank of the first or last stage, before ZeRO deals them.

    The embedding lies on the first stage, the head on the last: one table in a pipeline, and without one unless tied.
    """
    layers = layers_of_ranks(model, layout.pp)
    tables = model.embedding_parameters * (1 if layout.pp > 1 or model.tied else 2) + model.last_norm_parameters
    dense = model.layer_parameters - model.expert_parameters * model.experts
    if not model.experts:
        return (max(layers[0], layers[-1]) * model.layer_parameters + tables) / layout.tp
    mine = model.expert_parameters * model.experts / layout.ep
    return max(layers[0], layers[-1]) * (dense / layout.tp + mine) + tables / layout.tp
