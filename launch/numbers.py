"""A job's model as numbers: read from its config of `transformers`, checked against its parameters.

Names differ between families; a config translates those of its width, heads and layers itself (`attribute_map`), others
are looked for under the names in use. Whether the feed-forward has two or three matrices no config says: it is the one
with which the numbers have as many parameters as the model.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from meshwright.clusters.simulated import Transformer
from meshwright.launch.errors import JobError, Problem
from meshwright.launch.load import LoadedJob

__all__ = ["NAMES", "numbers_of", "read_numbers"]

NAMES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "num_layers", "n_layers"),
    "hidden": ("hidden_size", "d_model", "n_embd"),
    "heads": ("num_attention_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"),
    "vocab": ("vocab_size",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_top_k"),
}
"""Number -> names that configs have for it, in order."""

_OF_EXPERTS = ("moe_intermediate_size", "ffn_dim_expert")
_NEEDED = ("layers", "hidden", "heads", "vocab")
_ONE = Transformer(layers=1, hidden=1, heads=1, kv_heads=1, ffn=1, vocab=0, sequence=1)
_CLOSE = 0.02  # share of the parameters that may be elsewhere: norms, biases, tables of positions


def numbers_of(loaded: LoadedJob, given: Mapping[str, int]) -> tuple[Transformer, tuple[str, ...]]:
    """The job's model as numbers, and notes about what was taken to be usual or does not agree.

    Args:
        loaded: a job with a model.
        given: numbers that stand over those of the config.

    Raises:
        JobError: the job has no model, or its numbers cannot be read.
    """
    from meshwright.launch.rehearse import model_on_meta
    from meshwright.parallel.blocks import find_blocks

    job = loaded.job
    if job.model is None or job.data is None:
        text = "the job runs a command, so nothing is known of its model; give it model: and data:"
        raise JobError([Problem(loaded.where("model"), "model", text)])
    model = model_on_meta(loaded)
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    try:
        found, notes = read_numbers(config, sequence=job.data.sequence_length, given=given)
    except ValueError as error:
        raise JobError([Problem(loaded.where("model"), "model", str(error))]) from error
    held = {id(each): each.numel() for block in find_blocks(model).values() for each in block.parameters()}
    return _agreeing(found, notes, sum(held.values()))


def read_numbers(
    config: Any, *, sequence: int, given: Mapping[str, int] | None = None
) -> tuple[Transformer, list[str]]:
    """Numbers that a config has under any of the names in use; a feed-forward of two matrices.

    Args:
        config: with attributes; None where a model has none.
        sequence: tokens of a sequence.
        given: numbers that stand over those of the config.

    Raises:
        ValueError: naming what the config does not say.

    >>> from types import SimpleNamespace
    >>> gpt2 = SimpleNamespace(n_layers=12, n_embd=768, n_heads=12, vocab_size=50257, n_inner=None)
    >>> read_numbers(gpt2, sequence=1024)[1]  # doctest: +ELLIPSIS
    ['kv_heads 12: as many as heads, since the config does not say', 'ffn 3072: four times hidden, since ...']
    """
    own = dict(given or {})
    found = {name: _first(config, names) for name, names in NAMES.items()} | own
    if missing := [name for name in _NEEDED if found[name] is None]:
        raise ValueError(
            f"its config does not say {', '.join(missing)} (looked for: {', '.join(NAMES[missing[0]])}); "
            f"give {' and '.join(f'--with {name}=NUMBER' for name in missing)}"
        )
    if found["experts"] and "ffn" not in own:
        found["ffn"] = _first(config, _OF_EXPERTS) or found["ffn"]
    lacking = {name: usual for name, usual in _usual(found).items() if found[name] is None}
    found |= {name: value for name, (value, _) in lacking.items()}
    notes = [f"{name} {value}: {why}, since the config does not say" for name, (value, why) in lacking.items() if why]
    sizes: dict[str, Any] = {**found, "top_k": found["top_k"] if found["experts"] else 0}
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return replace(_ONE, **sizes, sequence=sequence, tied=tied), notes


def _usual(found: Mapping[str, int | None]) -> dict[str, tuple[int, str]]:
    """What is taken where a config does not say, and a note about it."""
    return {
        "kv_heads": (found["heads"] or 0, "as many as heads"),
        "ffn": (4 * (found["hidden"] or 0), "four times hidden"),
        "experts": (0, ""),
        "top_k": (1 if found["experts"] else 0, "one expert of a token" if found["experts"] else ""),
    }


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((each for each in values if isinstance(each, int) and not isinstance(each, bool)), None)


def _agreeing(found: Transformer, notes: list[str], parameters: int) -> tuple[Transformer, tuple[str, ...]]:
    """With two or three matrices in the feed-forward, whichever agrees with the parameters of all layers."""

    def counted(numbers: Transformer) -> int:
        return numbers.layers * numbers.layer_parameters

    nearer = min(found, replace(found, gated=True), key=lambda each: abs(counted(each) - parameters))
    if parameters and abs(counted(nearer) - parameters) > _CLOSE * parameters:
        notes.append(
            f"the model's layers have {parameters:,} parameters, the numbers {counted(nearer):,}: what else they have "
            "(other kinds of layers, shared experts, heads wider than hidden / heads) is not in what follows"
        )
    return nearer, tuple(notes)
