"""The repeated blocks of a model, found by structure or named by patterns.

A block list is a `ModuleList` or `Sequential` that holds at least two modules of one type, the outermost
where they nest. Its items are the units that are gathered, recomputed or moved together; what stands around
them is glue.
"""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import combinations

from torch import nn

from meshwright.parallel.errors import WrapError
from meshwright.parallel.tensor_plan import starred

__all__ = ["candidates", "find_blocks", "own_blocks", "own_parameters"]

_MOST_SHOWN = 6
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)


def find_blocks(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Names and modules of all repeated blocks, in the model's order; empty where there are none.

    Args:
        model: any.
        patterns: of paths (`fnmatch`; * also stands for dots), where structure is not asked. The outermost modules that
            a pattern fits are blocks, in the order of the patterns and, for one pattern, of the model.

    Raises:
        WrapError: for a pattern that fits nothing, and for blocks that cannot be called one after the other.

    >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 1)})
    >>> list(find_blocks(model))
    ['layers.0', 'layers.1']
    >>> list(find_blocks(model, ["head", "layers.*"]))
    ['head', 'layers.0', 'layers.1']
    """
    if patterns is not None:
        return _named(model, patterns)
    if isinstance(model, (nn.ModuleList, nn.Sequential)) and _repeats(model):
        return dict(model.named_children())
    return dict(_walk(model, ""))


def candidates(model: nn.Module) -> list[str]:
    """Patterns that may name the blocks of a model: of items of containers, then of outermost siblings with parameters.

    >>> candidates(nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2), "act": nn.Tanh()}))
    ['first', 'second']
    """
    kinds = (*_NEVER_CALLED, nn.Sequential)
    holders = [path for path, module in model.named_modules() if path and isinstance(module, kinds)]
    whole = isinstance(model, (nn.ModuleList, nn.Sequential))
    items = ["*"] if whole else [f"{starred(path)}.*" for path in _outermost(holders)]
    prefix = ""
    while True:
        found = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
        if len(found) != 1:
            break
        ((name, model),) = found.items()
        prefix += f"{name}."
    siblings = [starred(prefix + name) for name, child in found.items() if not isinstance(child, _NEVER_CALLED)]
    return list(dict.fromkeys([*items, *siblings]))[:_MOST_SHOWN]


def own_blocks(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The blocks that share no parameter with anything outside themselves.

    >>> shared = nn.Linear(2, 2)
    >>> list(own_blocks(nn.Sequential(shared, nn.Linear(2, 2), shared)))
    ['1']
    """
    blocks = find_blocks(model, patterns)
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


def _named(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    paths = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        fitting = _outermost([path for path in paths if fnmatchcase(path, pattern)])
        if not fitting:
            raise WrapError(f"blocks: no module has a path like {pattern!r}; {_nearest_paths(pattern, paths)}")
        found |= {path: paths[path] for path in fitting}
    _check_named(found)
    return found


def _check_named(blocks: Mapping[str, nn.Module]) -> None:
    """Blocks are called, each is another one, and none is inside of another."""
    for path, block in blocks.items():
        if isinstance(block, _NEVER_CALLED):
            raise WrapError(f"blocks: {path} is a {type(block).__name__}, which is never called; name {path}.*")
    for (one, block), (other, second) in combinations(blocks.items(), 2):
        if block is second:
            raise WrapError(
                f"blocks: {one} and {other} are one module that is called several times, and a stage is done with a "
                "block when it was called once; name larger blocks, or use schedule='accumulate' without blocks="
            )
        inner, outer = (one, other) if one.startswith(f"{other}.") else (other, one)
        if inner.startswith(f"{outer}."):
            raise WrapError(f"blocks: {inner} is inside of {outer}, which is named too; name one of them")


def _outermost(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def _nearest_paths(pattern: str, paths: Mapping[str, nn.Module]) -> str:
    known = list(dict.fromkeys(starred(path) for path in paths))
    close = get_close_matches(pattern, known, n=3, cutoff=0.4)
    return f"nearest: {', '.join(close)}" if close else f"choose from: {', '.join(known[:_MOST_SHOWN])}"


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
