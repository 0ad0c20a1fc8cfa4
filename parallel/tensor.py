"""Tensor and sequence parallelism on an unmodified model: the one place that executes a `TensorPlan`.

Parameters become this rank's local tensors, the numbers of heads that the model's code asks for become local ones,
and hooks put the collectives of `exchange` where a region begins and ends. The model's own forward runs.
"""

from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from meshwright.parallel.dealt_matrices import DealtColumns, DealtRows, Entry
from meshwright.parallel.dropout import PlainDropout, with_plain_dropout
from meshwright.parallel.exchange import Axis, cut, join
from meshwright.parallel.layout import Split
from meshwright.parallel.length import Length
from meshwright.parallel.passing import note_passing, on_passing
from meshwright.parallel.tensor_plan import TensorPlan

Each = TypeVar("Each")

__all__ = ["changed", "install", "keep_shares", "length_of", "open_streams"]


def keep_shares(model: nn.Module, splits: Mapping[str, Split], rank: int) -> None:
    """Replaces every parameter and buffer in `splits` by this rank's share; ties stay ties."""
    shares: dict[int, Tensor] = {}
    for name, split in splits.items():
        module_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module_name)
        full = getattr(owner, leaf)
        if id(full) not in shares:
            share = split.take(full.detach(), rank)
            if isinstance(full, nn.Parameter):
                share = nn.Parameter(share, requires_grad=full.requires_grad)
            shares[id(full)] = share
            shares[id(share)] = share
        setattr(owner, leaf, shares[id(full)])


def install(model: nn.Module, plan: TensorPlan, axis: Axis, lengths: Mapping[str, Length] | None = None) -> None:
    """Puts a plan's collectives around a model whose parameters are shares already.

    Args:
        model: changed in place.
        plan: what to do.
        axis: the ranks of `tp`.
        lengths: unit -> its stream, where the caller deals the sequence itself; None makes them from the plan.
    """
    if lengths is None:
        lengths = open_streams(model, plan, axis)
    entries = {row: Entry(axis) for row in plan.rows}
    for path, attributes in plan.attributes.items():
        _set_attributes(model.get_submodule(path), attributes, axis.rank)
    for path, (row, keys) in plan.gathers.items():
        _gather_before(model.get_submodule(path), entries[row], keys, length_of(path, lengths))
    for path, keys in plan.joined.items():
        _run_whole(model.get_submodule(path), axis, keys, length_of(path, lengths))
    for path, row in plan.columns.items():
        matrix = model.get_submodule(path)
        matrix.forward = DealtColumns(matrix, entries[row], plan.transposed[path])
    for path, transposed in plan.rows.items():
        matrix = model.get_submodule(path)
        matrix.forward = DealtRows(matrix, axis, entries[path], transposed, length_of(path, lengths))
    for path, slices in plan.slices.items():
        _cut_before(model.get_submodule(path), axis, slices)
    for path in plan.drops:
        with_plain_dropout(
            model.get_submodule(path), partial(_plain_dropout, plan, path, axis, length_of(path, lengths))
        )


def length_of(path: str, lengths: Mapping[str, Each]) -> Each | None:
    """What is known of the stream of the unit that a module lies in."""
    parts = path.split(".")
    for end in range(len(parts), -1, -1):
        found = lengths.get(".".join(parts[:end]))
        if found is not None:
            return found
    return None


def _set_attributes(module: nn.Module, attributes: Mapping[str, tuple[int, ...]], rank: int) -> None:
    for name, values in attributes.items():
        owner, _, leaf = name.rpartition(".")
        if owner:  # a number in the module's config: the module gets its own copy of it
            setattr(module, owner, copy(getattr(module, owner)))
            setattr(getattr(module, owner), leaf, values[rank])
        else:
            setattr(module, leaf, values[rank])


def _gather_before(module: nn.Module, entry: Entry, keys: tuple[int | str, ...], length: Length | None) -> None:
    if length is None:
        return

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        del module
        return changed(args, kwargs, keys=keys, change=_once(length, lambda value: entry.gathered(value, length.full)))

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _once(length: Length, work: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """Applies `work` to shares of the stream, once to each: a value passed twice stays one value."""
    done: dict[int, Tensor] = {}

    def change(value: Any) -> Any:
        if not length.is_share(value):
            return value
        if id(value) not in done:
            done[id(value)] = work(value)
        return done[id(value)]

    return change


def _run_whole(module: nn.Module, axis: Axis, keys: tuple[int | str, ...], length: Length | None) -> None:
    """Around a module that every rank runs alike on the full sequence; what it says of each position is dealt.

    So is what it does to its arguments in place, such as noise that routers add.
    """
    if length is None:
        return
    entered: list[tuple[Tensor, Tensor, int | None]] = []

    def whole(value: Tensor) -> Tensor:
        made = join(value, axis, 1, length.full)
        entered.append((value, made, _version(made)))
        return made

    def dealt(value: Any) -> Any:
        is_whole = isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == length.full
        return cut(value, axis, 1) if is_whole else value

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        del module
        entered.clear()
        return changed(args, kwargs, keys=keys, change=_once(length, whole))

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        for value, made, version in entered:
            if version is None or _version(made) != version:
                value.copy_(cut(made, axis, 1))
        entered.clear()
        return _mapped(output, dealt)

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


def _version(tensor: Tensor) -> int | None:
    """Changes in place so far; None where torch does not count them."""
    return None if tensor.is_inference() else tensor._version


def _cut_before(unit: nn.Module, axis: Axis, slices: tuple[tuple[int | str, Split], ...]) -> None:
    """Gives a unit its heads' part of values that carry one number or map per head, unless they are parts already."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        del module
        for key, split in slices:

            def change(value: Any, split: Split = split) -> Any:
                if not isinstance(value, Tensor) or value.shape[split.dim] != split.size:
                    return value
                return cut(value, axis, split.dim) if value.requires_grad else split.take(value, axis.rank)

            args, kwargs = changed(args, kwargs, keys=(key,), change=change)
        return args, kwargs

    unit.register_forward_pre_hook(hook, with_kwargs=True)


def _plain_dropout(plan: TensorPlan, path: str, *where: Any) -> PlainDropout:
    axis, length = where
    return PlainDropout(
        plan.drops[path],
        rank=axis.rank,
        dealing=axis.dealing,
        length=None if length is None else lambda: length.full,
        heads=bool(plan.rows),
    )


def open_streams(model: nn.Module, plan: TensorPlan, axis: Axis) -> dict[str, Length]:
    """Deals the sequence before the first block of each stream and joins it after the last; returns block -> stream."""
    lengths: dict[str, Length] = {}
    for stream in plan.streams:
        length = Length(axis)
        lengths.update(dict.fromkeys(stream.blocks, length))

        def before(module: nn.Module, args: Any, kwargs: Any, *, key: Any = stream.key) -> Any:
            note_passing(module, (args, kwargs))
            return changed(args, kwargs, keys=(key,), change=lambda value: cut(value, axis, value.dim() - 2))

        def after(module: nn.Module, args: Any, output: Any, *, length: Length = length) -> Any:
            del module, args
            return _mapped(
                output,
                lambda value: join(value, axis, value.dim() - 2, length.full) if length.is_share(value) else value,
            )

        first = model.get_submodule(stream.blocks[0])
        on_passing(first, partial(_open, length, stream.key))
        first.register_forward_pre_hook(before, with_kwargs=True)
        model.get_submodule(stream.blocks[-1]).register_forward_hook(after)
    return lengths


def _open(length: Length, key: int | str, arguments: Any) -> None:
    args, kwargs = arguments
    length.open(args[key] if isinstance(key, int) else kwargs[key])


def changed(args: tuple[Any, ...], kwargs: dict[str, Any], *, keys: Any, change: Any) -> tuple[Any, dict[str, Any]]:
    """Arguments of a call, those at `keys` changed."""
    positions = list(args)
    for key in keys:
        if isinstance(key, int) and key < len(positions):
            positions[key] = change(positions[key])
        elif key in kwargs:
            kwargs = {**kwargs, key: change(kwargs[key])}
    return tuple(positions), kwargs


def _mapped(output: Any, change: Any) -> Any:
    """The first level of a module's output with its tensors changed."""
    if isinstance(output, Tensor):
        return change(output)
    if type(output) in (tuple, list):
        return type(output)(_mapped(item, change) if isinstance(item, Tensor) else item for item in output)
    if isinstance(output, dict):
        for name, item in list(output.items()):
            if isinstance(item, Tensor):
                output[name] = change(item)
    return output
