"""Which embeddings and heads are dealt by rows of the vocabulary."""

from dataclasses import replace

from torch import Tensor, nn

from meshwright.parallel.layout import Split
from meshwright.parallel.tensor_plan import Decision, TensorPlan
from meshwright.parallel.watch import Sight
from meshwright.parallel.wishes import Wishes

__all__ = ["with_vocabulary"]


def with_vocabulary(
    model: nn.Module, plan: TensorPlan, sight: Sight, wishes: Wishes
) -> tuple[TensorPlan, list[Decision]]:
    """Adds embeddings and heads that are dealt by rows of the vocabulary."""
    decisions: list[Decision] = []
    for path in sorted(sight.scored | sight.leaked):
        wish = wishes.of(path)
        tables = _tables_of(model, sight, path)
        names = _names_of(model, sight, (path, *tables))
        asked = wish is not None and wish[0] == "vocabulary" and wish[1].startswith("your")
        refused = path in plan.rows or path in plan.columns or (wish is not None and wish[0] in ("replicate", "row"))
        if refused or not names or not (tables or asked):
            continue
        split = Split.even(0, sight.matrices[path].outputs, plan.degree)
        plan = replace(
            plan,
            calls={**plan.calls, **_calls(sight, path, tables)},
            splits={**plan.splits, **dict.fromkeys(names, split)},
            heads=(*plan.heads, path),
            lookups=(*plan.lookups, *(each for each in tables if each not in plan.lookups)),
        )
        reason = f"{wish[1] if wish else 'rule: scores of a vocabulary'}; {split.size} rows"
        decisions.append(Decision(path, "vocabulary", reason))
        decisions += [Decision(each, "vocabulary", f"as many rows as {path} has scores") for each in tables]
    return plan, decisions


def _calls(sight: Sight, head: str, tables: list[str]) -> dict[str, tuple[tuple[str, int], ...]]:
    """Collectives of a head and its embeddings in one forward and backward pass."""
    scored: list[tuple[str, int]] = []
    for entering, _ in sight.elements[head]:
        rows = entering // sight.matrices[head].inputs
        scored += [("all_reduce", each) for each in (entering, rows, 2 * rows)]  # hidden; largest; sums
    looked_up = {each: tuple(("all_reduce", made) for _, made in sight.elements[each]) for each in tables}
    return {**looked_up, head: tuple(scored)}


def _names_of(model: nn.Module, sight: Sight, paths: tuple[str, ...]) -> list[str]:
    """All names of the parameters of a head and its embeddings; none where something else uses them too."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    modules = [model.get_submodule(path) for path in paths]
    tied = {name for each in modules for name in owners[id(each.weight)]}
    users = {name.rpartition(".")[0] for name in tied} & {*sight.matrices, *sight.lookups}
    if users - set(paths) or tied & sight.used_directly or not all(map(_is_plain_table, modules[1:])):
        return []
    bias = modules[0].bias
    return [*sorted(tied), *(owners[id(bias)] if isinstance(bias, Tensor) else [])]


def _tables_of(model: nn.Module, sight: Sight, head: str) -> list[str]:
    """Embeddings with one row for each score of a head."""
    matrix = sight.matrices[head]
    if matrix.transposed:
        return []
    tables = {path: model.get_submodule(path).weight for path in sorted(sight.lookups)}
    return [path for path, weight in tables.items() if isinstance(weight, Tensor) and weight.shape[0] == matrix.outputs]


def _is_plain_table(table: nn.Module) -> bool:
    odd = ("max_norm", "sparse", "scale_grad_by_freq")
    return not any(getattr(table, name, None) for name in odd) and not any(True for _ in table.children())
