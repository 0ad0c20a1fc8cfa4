"""The repeated blocks of a model, found by structure.

A block list is a `ModuleList` or `Sequential` that holds at least two modules of one type, the outermost
where they nest. Its items are the units that are gathered, recomputed or moved together; what stands around
them is glue.
"""

from collections.abc import Iterator, Mapping

from torch import nn

__all__ = ["find_blocks", "own_blocks", "own_parameters"]


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Names and modules of all repeated blocks, in the model's order; empty where there are none.

    >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 1)})
    >>> list(find_blocks(model))
    ['layers.0', 'layers.1']
    """
    if isinstance(model, (nn.ModuleList, nn.Sequential)) and _repeats(model):
        return dict(model.named_children())
    return dict(_walk(model, ""))


def own_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that share no parameter with anything outside themselves.

    >>> shared = nn.Linear(2, 2)
    >>> list(own_blocks(nn.Sequential(shared, nn.Linear(2, 2), shared)))
    ['1']
    """
    blocks = find_blocks(model)
    owners: dict[int, set[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        home = next((index for index, block in enumerate(blocks) if name.startswith(block + ".")), -1)
        owners.setdefault(id(parameter), set()).add(home)
    return {
        name: block
        for name, block in blocks.items()
        if all(len(owners[id(parameter)]) == 1 for parameter in block.parameters())
        and any(True for _ in block.parameters())
    }


def own_parameters(model: nn.Module, stage_of: Mapping[str, int]) -> tuple[dict[int, list[str]], list[str]]:
    """Names of the parameters that the blocks of one stage hold and nothing else does, by stage; and of all others.

    >>> shared = nn.Linear(2, 2, bias=False)
    >>> own_parameters(nn.Sequential(shared, nn.Linear(2, 2), shared), {"0": 0, "1": 1, "2": 2})
    ({0: [], 1: ['1.weight', '1.bias'], 2: []}, ['0.weight'])
    """
    holders: dict[int, set[int | None]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stage = next((stage for block, stage in stage_of.items() if name.startswith(block + ".")), None)
        holders.setdefault(id(parameter), set()).add(stage)
    own: dict[int, list[str]] = {stage: [] for stage in stage_of.values()}
    rest: list[str] = []
    for name, parameter in model.named_parameters():
        held = holders[id(parameter)]
        stage = next(iter(held))
        (rest if len(held) > 1 or stage is None else own[stage]).append(name)
    return own, rest


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and _repeats(child):
            yield from ((f"{path}.{index}", block) for index, block in child.named_children())
        else:
            yield from _walk(child, path + ".")


def _repeats(children: nn.Module) -> bool:
    kinds = [type(child) for child in children.children()]
    return len(kinds) >= 2 and max(kinds.count(kind) for kind in kinds) >= 2
