"""The axis `dp`: every rank holds whole parameters; gradients are summed in buckets while backward still runs.

Experts that are dealt have buckets of their own, which are summed over `edp`, the ranks that hold the same ones.

Buckets are cut once, from the order of the parameters, and launched in that order on every rank. Torch's DDP cuts
them anew after its first step, which changes the order of additions and so the bits of a run that is resumed;
here step n of a resumed run adds in the same order as step n of an undisturbed one. Each bucket ends with one flag per
parameter, so that the sum also says which parameters some rank used.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor, nn

from meshwright.parallel.blocks import own_parameters
from meshwright.parallel.collectives import Groups, Pending
from meshwright.parallel.data import AskScale, LocalStates
from meshwright.parallel.errors import WrapError
from meshwright.parallel.spread import Spread

__all__ = ["Replicate", "cut_buckets"]


@dataclass
class _Bucket:
    axis: str
    names: list[str]
    flat: Tensor
    views: dict[str, Tensor]
    flags: Tensor
    missing: set[str] = field(default_factory=set)
    ready: set[str] = field(default_factory=set)
    hooks: dict[str, int] = field(default_factory=dict)
    pending: Pending | None = None


def cut_buckets(sizes_bytes: list[int], first_bytes: int, bucket_bytes: int) -> list[list[int]]:
    """Groups indices in order until a bucket is full; the first bucket is small so that sending starts early.

    >>> cut_buckets([4, 4, 8, 100, 2], first_bytes=4, bucket_bytes=12)
    [[0], [1, 2], [3], [4]]
    """
    buckets: list[list[int]] = []
    filled, limit = 0, 0
    for index, size in enumerate(sizes_bytes):
        if not buckets or filled + size > limit:
            limit = first_bytes if not buckets else bucket_bytes
            buckets.append([])
            filled = 0
        buckets[-1].append(index)
        filled += size
    return buckets


class Replicate(LocalStates):
    """Data engine for whole parameters on every rank.

    Args:
        module: the model, the same on every rank.
        groups: process groups; gradients are summed along `dp`.
        spread: what `tp` and `pp` add.
        bucket_bytes: size of one all-reduce.
    """

    def __init__(self, module: nn.Module, groups: Groups, spread: Spread, *, bucket_bytes: int) -> None:
        super().__init__(module, groups, norm_axes=(), spread=spread)
        self._last = True
        self._num_awaited: int | None = None
        self._num_added: Counter[str] = Counter()
        self._scale: Tensor | None = None
        self._divides = False
        self._home: dict[str, _Bucket] = {}
        self._queues: dict[str, list[_Bucket]] = {}
        self._next: Counter[str] = Counter()
        self._own, _ = own_parameters(module, spread.stages.mine)
        dense, experts = spread.experts.parted(self.local())
        for axis, names in (("dp", dense), ("edp", experts)):
            if names and groups.group(axis) is not None:
                self._fill_buckets(axis, list(names), bucket_bytes)
        self._buckets = [bucket for queue in self._queues.values() for bucket in queue]
        self._alone = [name for name in self._trained if name not in self._home]

    def begin(self) -> None:
        """Forgets the gradients of the step before."""
        for parameter in self._trained.values():
            parameter.grad = None
        for bucket in self._buckets:
            bucket.ready.clear()
            bucket.missing.clear()
            for name, key in bucket.hooks.items():
                _call_last(self._trained[name], key)
        self._next.clear()
        self._num_added.clear()
        self._scale = None
        self._divides = False

    def prepare(self, last: bool) -> None:
        """Says whether the next micro-batch is the last of its step."""
        self._last = last

    def backward(self, loss: Tensor, items: Tensor, ask_scale: AskScale | None) -> None:
        """Adds `items` times the gradient of `loss`; full buckets leave during the last micro-batch."""
        self._ask_scale = ask_scale or self._ask_scale
        if self._last and not self._buckets:
            scale = self._ask_scale().to(items.dtype)  # nobody to wait for: the division costs nothing here
            held = [each.grad for each in self._trained.values() if each.grad is not None]
            if held:
                torch._foreach_mul_(held, scale)
            items = items * scale
        self._divides = bool(self._buckets)
        loss.backward(gradient=items)

    def follow(self, ask_scale: AskScale, num_microbatches: int) -> None:
        """Gradients are divided in their buckets, or at the end; they leave once every micro-batch added its own."""
        self._ask_scale = ask_scale
        self._divides = True
        self._num_awaited = num_microbatches

    def reduce(self, stage: int) -> None:
        """Takes what some micro-batch did not use, since nothing will be added to gradients of this stage any more."""
        for name in self._own.get(stage, ()):
            if name in self._home and name not in self._home[name].ready:
                self._take(self._home[name], name, self._trained[name].grad)
        self._send_ready()

    def launch(self) -> None:
        """Sends the buckets that backward did not fill; their missing gradients count as zero."""
        for bucket in self._buckets:
            for name in bucket.names:
                if name not in bucket.ready:
                    self._take(bucket, name, self._trained[name].grad)
        self._send_ready()

    def finish(self) -> None:
        """Waits for the sums; parameters no rank used keep no gradient."""
        if self._divides:
            held = [each for name in self._alone if (each := self._trained[name].grad) is not None]
            if held:
                torch._foreach_mul_(held, self._ask_scale())
        for bucket in self._buckets:
            assert bucket.pending is not None, bucket.names
            bucket.pending.wait()
            used = set(bucket.names)
            if bucket.missing:  # flags are read only where this rank cannot know
                flags = self._groups.flags(bucket.flags)
                used = {name for name, flag in zip(bucket.names, flags, strict=True) if flag}
            for name in bucket.names:
                self._trained[name].grad = bucket.views[name].detach() if name in used else None
        self._sum_over_copies()

    def _fill_buckets(self, axis: str, names: list[str], bucket_bytes: int) -> None:
        names = names[::-1]  # backward reaches the last layers first
        queue: list[_Bucket] = []
        self._queues[axis] = queue
        for dtype in dict.fromkeys(self._trained[name].dtype for name in names):
            same = [name for name in names if self._trained[name].dtype == dtype]
            sizes = [self._trained[name].numel() * dtype.itemsize for name in same]
            for indices in cut_buckets(sizes, min(bucket_bytes, 1 << 20), bucket_bytes):
                queue.append(bucket := self._make_bucket(axis, [same[index] for index in indices]))
                for name in bucket.names:
                    self._home[name] = bucket
                    hook = self._trained[name].register_post_accumulate_grad_hook(self._hook(bucket, name))
                    bucket.hooks[name] = hook.id

    def _make_bucket(self, axis: str, names: list[str]) -> _Bucket:
        parameters = [self._trained[name] for name in names]
        sizes = [each.numel() for each in parameters]
        flat = torch.zeros(sum(sizes) + len(names), dtype=parameters[0].dtype, device=parameters[0].device)
        *parts, flags = flat.split([*sizes, len(names)])
        views = {name: part.view_as(each) for name, part, each in zip(names, parts, parameters, strict=True)}
        return _Bucket(axis, names, flat, views, flags)

    def _hook(self, bucket: _Bucket, name: str) -> Callable[[Tensor], None]:
        engine = ref(self)  # torch's collector does not see through these hooks: a cycle would keep groups for good

        def on_gradient(parameter: Tensor) -> None:
            self = engine()
            if self is None:
                return
            self._num_added[name] += 1
            if not self._last if self._num_awaited is None else self._num_added[name] < self._num_awaited:
                return
            if name in bucket.ready:
                raise WrapError(
                    f"parameter {name} received a second gradient in one backward pass, after its bucket was filled; "
                    "use torch.utils.checkpoint with use_reentrant=False"
                )
            self._take(bucket, name, parameter.grad)
            self._send_ready()

        return on_gradient

    def _take(self, bucket: _Bucket, name: str, gradient: Tensor | None) -> None:
        view = bucket.views[name]
        if gradient is None:
            view.zero_()
            bucket.missing.add(name)
        else:
            if self._scale is None:
                self._scale = self._ask_scale()
            torch.mul(gradient, self._scale, out=view)
            self._trained[name].grad = view.detach()  # `Module.to` gives a gradient new memory, and must not the bucket
        bucket.ready.add(name)

    def _send_ready(self) -> None:
        """Launches full buckets of an axis strictly in order, so that every rank of it calls the same collectives."""
        for axis, queue in self._queues.items():
            while self._next[axis] < len(queue):
                bucket = queue[self._next[axis]]
                if len(bucket.ready) < len(bucket.names):
                    break
                self._send(bucket)
                self._next[axis] += 1

    def _send(self, bucket: _Bucket) -> None:
        bucket.flags.fill_(1)
        if bucket.missing:
            bucket.flags.copy_(torch.tensor([float(name not in bucket.missing) for name in bucket.names]))
        bucket.pending = self._groups.all_reduce(bucket.flat, bucket.axis)


def _call_last(parameter: nn.Parameter, key: int) -> None:
    """A user's hook that was added behind ours would change a gradient that is on its way."""
    hooks = parameter._post_accumulate_grad_hooks  # torch goes through it in the order of its memory
    if hooks and next(reversed(hooks)) != key:
        hooks[key] = hooks.pop(key)
