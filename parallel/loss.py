"""The loss contract: what the user's loss is a mean of, and how many items each micro-batch holds.

A model returns a mean (over tokens or samples) or a sum. The global result must equal the plain run's for every
mix of axes, micro-batches and uneven counts, so each micro-batch's gradient is weighted by its own number of
items and the sum is divided by the global number once:  g = sum_m n_m g_m / sum_m n_m.
Items are counted where the model really calls its loss, because models shift, pad and ignore labels themselves.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from meshwright.parallel.errors import LossError, nearest
from meshwright.parallel.microbatch import num_samples

__all__ = ["LossContract", "LossItems", "LossKind", "as_items", "items_of_graph", "loss_of"]

LossKind = Literal["token_mean", "sample_mean", "sum"]

_ELEMENT_LOSSES = (
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
    functional.kl_div,
    functional.poisson_nll_loss,
    functional.gaussian_nll_loss,
)
_CLASS_LOSSES = (functional.cross_entropy, functional.nll_loss)
_HOW_OUT = "name the number of items with loss_items= (a batch key, or a function of the batch)"


@dataclass(frozen=True)
class LossContract:
    """What a model's loss is, and where its number of items comes from.

    Args:
        kind: "token_mean" (mean over counted targets), "sample_mean" (mean over dim 0 of the batch) or "sum".
        items: None counts the targets of the loss call the model makes; a batch key names a tensor whose sum is the
            number; a function receives the micro-batch and returns it.
        of_output: how to find the loss in the model's output; None takes a 0-dim tensor, `.loss`, `["loss"]`
            or the first element of a tuple.

    Raises:
        LossError: for an unknown kind.
    """

    kind: LossKind = "token_mean"
    items: str | Callable[[Any], Tensor | float] | None = None
    of_output: Callable[[Any, Any], Tensor] | None = None
    _graph_tells: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(LossKind):
            raise LossError(f"loss {self.kind!r} is not a contract; {nearest(str(self.kind), get_args(LossKind))}")

    def run(self, forward: Callable[[], Any], batch: Any, *, items: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs a forward pass; returns its loss (0-dim) and its number of items (0-dim, float64).

        Args:
            forward: returns the model's output.
            batch: what it takes.
            items: what `of_size` told before, as a tensor.
        """
        if items is not None:
            return self._loss(forward(), batch), items
        if self.kind == "token_mean" and self.items is None:
            return self._run_counted(forward, batch)
        loss = self._loss(forward(), batch)
        return loss, self._stated_items(batch, loss.device)

    def of_size(self, batch: Any) -> float | None:
        """The number of items, where the batch's size tells it before the forward."""
        if self.items is not None or self.kind == "token_mean":
            return None
        return 1.0 if self.kind == "sum" else float(num_samples(batch))

    def _run_counted(self, forward: Callable[[], Any], batch: Any) -> tuple[Tensor, Tensor]:
        """Counts the targets of the loss call.

        Listening to every call costs a percent of a step, so it is done until the autograd graph was seen to tell the
        same number.
        """
        if torch.is_grad_enabled() and self._graph_tells == [True]:
            loss = self._loss(forward(), batch)
            items = items_of_graph(loss)
            if items is None:
                raise LossError(f"the model's loss came from another call than in the step before; {_HOW_OUT}")
            return loss, items
        with LossItems() as counted:
            loss = self._loss(forward(), batch)
        items = counted.items(loss)
        counted.forget()
        if torch.is_grad_enabled() and not self._graph_tells:
            told = items_of_graph(loss)
            self._graph_tells.append(told is not None and bool(told == items))
        return loss, items

    def _loss(self, output: Any, batch: Any) -> Tensor:
        return loss_of(output) if self.of_output is None else self.of_output(output, batch)

    def _stated_items(self, batch: Any, device: torch.device) -> Tensor:
        of_size = self.of_size(batch)
        if of_size is not None:
            return as_items(of_size, device)
        if callable(self.items):
            items = self.items(batch)
            return items.to(device, torch.float64) if isinstance(items, Tensor) else as_items(items, device)
        if not isinstance(batch, Mapping) or self.items not in batch:
            keys = list(batch) if isinstance(batch, Mapping) else []
            raise LossError(
                f"loss_items={self.items!r} is no key of the batch; {nearest(str(self.items), map(str, keys))}"
            )
        return torch.as_tensor(batch[self.items]).sum(dtype=torch.float64).to(device)


def as_items(number: float, device: torch.device) -> Tensor:
    """A number of items (0-dim, float64)."""
    return torch.full((), number, dtype=torch.float64, device=device)  # a third of what `tensor` takes


def loss_of(output: Any) -> Tensor:
    """Finds the loss in what a model returns.

    >>> loss_of({"loss": torch.tensor(2.0), "logits": None})
    tensor(2.)

    Raises:
        LossError: when there is none, with the way out.
    """
    found = output if isinstance(output, Tensor) else _part_of(output)
    if isinstance(found, Tensor) and found.numel() == 1:
        return found if found.dim() == 0 else found.reshape(())
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    raise LossError(
        f"the model returned no loss: found {shape} in {type(output).__name__}; pass the labels in the batch, "
        "or loss_fn=(output, batch) -> 0-dim tensor"
    )


def _part_of(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output.get("loss")
    if hasattr(output, "loss"):
        return output.loss
    return output[0] if isinstance(output, (tuple, list)) and output else output


def items_of_graph(loss: Tensor) -> Tensor | None:
    """The number that torch's negative log likelihood divided by (0-dim, float64), where `loss` is its direct result.

    >>> scores = torch.zeros(3, 5, requires_grad=True)
    >>> items_of_graph(functional.cross_entropy(scores, torch.tensor([1, -100, 2])))
    tensor(2., dtype=torch.float64)
    """
    node = loss.grad_fn
    items = getattr(node, "_saved_total_weight", getattr(node, "items", None))
    if not isinstance(items, Tensor) or items.numel() != 1 or items.dtype not in (torch.float32, torch.float64):
        return None  # narrower types cannot count
    return items.detach().double()


class LossItems(TorchFunctionMode):
    """A context that counts the targets of every mean-reduced loss call made inside it.

    >>> with LossItems() as counted:
    ...     loss = functional.cross_entropy(torch.zeros(3, 5), torch.tensor([1, -100, 2]))
    >>> counted.items(loss)
    tensor(2., dtype=torch.float64)
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Tensor, Tensor]] = []
        self._other: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Passes every call on; counts those of a loss."""
        keywords = kwargs or {}
        result = func(*args, **keywords)
        if func in _CLASS_LOSSES or func in _ELEMENT_LOSSES:
            self._note(func, result, args, keywords)
        return result

    def items(self, loss: Tensor) -> Tensor:
        """Number of items (0-dim, float64) of the call that made `loss`.

        Raises:
            LossError: when no single mean-reduced call can be told to be it.
        """
        same = [items for result, items in self._calls if result is loss]
        found = same or [items for _, items in self._calls]
        if len(found) == 1:
            return found[0]
        seen = "no mean-reduced loss call" if not found else f"{len(found)} mean-reduced loss calls"
        also = f" (and {', '.join(self._other)})" if self._other else ""
        raise LossError(f"loss='token_mean', but the model made {seen}{also}; {_HOW_OUT}")

    def forget(self) -> None:
        """Lets go of losses: their graph may hold this context, which was entered while it was made."""
        self._calls.clear()

    def _note(self, func: Any, result: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        reduction = keywords.get("reduction", "mean")
        legacy = keywords.get("size_average") is not None or keywords.get("reduce") is not None
        if reduction not in ("mean", "batchmean") or legacy or not isinstance(result, Tensor):
            self._other.append(f"{func.__name__}(reduction={reduction!r})")
            return
        shape = (args[0] if args else keywords["input"]).shape  # asked first: scores may be held as something smaller
        with torch._C.DisableTorchFunction(), torch.no_grad():
            self._calls.append((result, _count(func, shape, (args, keywords))))


def _count(func: Any, scored: torch.Size, given: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """The denominator that torch divides by for a mean-reduced loss call on scores of shape `scored`."""
    args, keywords = given
    targets = args[1] if len(args) > 1 else keywords["target"]
    if func in _ELEMENT_LOSSES:
        shape = torch.broadcast_shapes(scored, targets.shape)
        number = shape[0] if keywords.get("reduction") == "batchmean" else torch.Size(shape).numel()
        return torch.tensor(float(number), dtype=torch.float64, device=targets.device)
    if targets.is_floating_point():  # class probabilities: torch divides by the batch, not by classes
        number = targets.numel() // targets.shape[1 if targets.dim() > 1 else 0]
        return torch.tensor(float(number), dtype=torch.float64, device=targets.device)
    weight = args[2] if len(args) > 2 else keywords.get("weight")
    counted = targets != keywords.get("ignore_index", -100)
    weights: Tensor = counted if weight is None else weight[targets.clamp(0, len(weight) - 1)].mul(counted)
    return weights.sum(dtype=torch.float64)
