"""Scores in the shape of all of them, of which something smaller is held.

The scores of a vocabulary are the largest tensor of a step. What a head gives can stand for them, row by row, until
cross entropy is computed from it: what models do with scores on the way to the loss (casts, slices of positions,
scaling, soft caps, reshapes) is followed on what is held. Anything else makes the scores whole first, which is exact.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import TensorWeakRef

from meshwright.parallel.errors import WrapError
from meshwright.parallel.following import WORK, Call

__all__ = ["Scores"]


class Scores(Tensor):
    """Scores [..., vocabulary]; what is held has the same rows [..., anything], and its history.

    Subclasses say how single scores, cross entropy and whole scores come from what is held.

    Attributes:
        vocabulary: size of the last dim.
        whole: the scores themselves, once something changed them in place.
    """

    vocabulary: int
    whole: Tensor | None
    _memory: list[TensorWeakRef]

    @classmethod
    def holding(cls, held: Tensor, vocabulary: int) -> Self:
        """Wraps what is held."""
        if isinstance(held, FakeTensor):  # a subclass already, which torch makes no other one of
            scores: Self = held.view_as(held)  # type: ignore[assignment]
            scores.__class__ = _fake(cls)
        else:
            scores = held.as_subclass(cls)
        scores.vocabulary, scores.whole = vocabulary, None
        scores._memory = [TensorWeakRef(scores)]
        return scores

    def like(self, held: Tensor) -> Self:
        """Scores of other rows, made as these are."""
        raise NotImplementedError

    def make_whole(self, func: Any) -> Tensor:
        """All scores, with their history, for a function that needs them."""
        raise NotImplementedError

    def own(self, row: Tensor) -> Tensor:
        """What belongs to the scores made here of a row [vocabulary] of numbers beside them."""
        raise NotImplementedError

    def each(self, call: Call) -> Any:
        """Calls a function element by element; tensors among its arguments are numbers or rows of own numbers."""
        raise NotImplementedError

    def entropy(self, target: Tensor, ignore_index: int, reduction: str) -> Any:
        """Cross entropy of scores [rows, vocabulary] with class indices [rows]."""
        raise NotImplementedError

    def kind(self) -> Tensor:
        """A tensor of the dtype and device of the scores."""
        return self.held()

    def without_history(self) -> Self:
        """The same values, detached."""
        return self.of_rows(self.held().detach())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Works on what is held where that is the same, and on whole scores elsewhere."""
        args, keywords = [_now(each) for each in args], {key: _now(each) for key, each in (kwargs or {}).items()}
        scores = next((each for each in args[:1] if isinstance(each, Scores)), keywords.get("input"))
        with torch._C.DisableTorchFunctionSubclass():
            if isinstance(func, OpOverload):  # below the functions that a model calls
                return func(*args, **keywords)
            work = WORK.get(func)
            if work is not None and isinstance(scores, Scores):
                rest = {key: each for key, each in keywords.items() if key != "input"}
                if not any(isinstance(each, Scores) for each in (*args[1:], *rest.values())):
                    done = work(scores, Call(func, tuple(args[1:]), rest))
                    if done is not NotImplemented:
                        return done
            return _on_whole(func, args, keywords)

    def held(self) -> Tensor:
        """What is held, as an ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def full_shape(self) -> torch.Size:
        """The shape of all scores."""
        return torch.Size([*self.held().shape[:-1], self.vocabulary])

    def of_rows(self, rows: Tensor) -> Self:
        """Scores of rows taken from what is held; they share memory where the rows do."""
        made = self.like(rows)
        if rows.untyped_storage()._cdata == self.held().untyped_storage()._cdata:
            self._memory.append(TensorWeakRef(made))
            made._memory = self._memory
        return made

    def change(self, how: Callable[[], object], func: Any) -> None:
        """Changes what these scores are made of, where a function changed their memory.

        Raises:
            WrapError: where other scores share that memory.
        """
        alive = [each for reference in self._memory if (each := reference()) is not None]
        if any(each is not self for each in alive):
            raise WrapError(
                f"{func.__name__} changes scores in place that the model also holds under another name, and which are "
                "not in memory here; make the change on a copy, or leave the loss out of blockwise= or tp"
            )
        how()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.full_shape())})"

    def __hash__(self) -> int:
        return id(self)


@lru_cache
def _fake(cls: type[Scores]) -> Any:
    """Scores without values."""
    return type(f"Fake{cls.__name__}", (cls, FakeTensor), {"__module__": cls.__module__})


def _now(value: Any) -> Any:
    return value.whole if isinstance(value, Scores) and value.whole is not None else value


def _on_whole(func: Any, args: list[Any], keywords: Mapping[str, Any]) -> Any:
    """Runs a function on whole scores; those that it changed in place are whole from now on."""
    made: list[tuple[Scores, Tensor, int]] = []

    def whole(value: Any) -> Any:
        if isinstance(value, Scores):
            scores = value.make_whole(func)
            made.append((value, scores, scores._version))
            return scores
        if type(value) in (list, tuple):
            return type(value)(whole(_now(each)) for each in value)
        return value

    done = func(*[whole(each) for each in args], **{key: whole(each) for key, each in keywords.items()})
    for scores, changed, version in made:
        if changed._version != version:
            scores.change(lambda scores=scores, changed=changed: setattr(scores, "whole", changed), func)  # type: ignore[misc]
    return done
