"""One call of a model's attention as a value, and the plug through which all of them arrive at one place.

The model stays as it is. Its modules are told apart from those of other models in the process by identity, so what is
patched for all (the attention interface of `transformers`, two functions of torch) does for every other model what it
did before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from meshwright.parallel.blockwise.masks import Mask
from meshwright.parallel.errors import WrapError

__all__ = [
    "AttentionCall",
    "Handler",
    "Plug",
    "called",
    "calling_module",
    "has_hooks",
    "is_hooked",
    "name_of_calling",
    "plug_of",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionCall:
    """What a module asks for: softmax(softcap(scale * query key^T) + bias, where the mask allows) value.

    Heads are this rank's where `tp` deals them. Query heads are a multiple of key heads, in consecutive groups.

    Attributes:
        query: [b, heads, s_q, d].
        key: [b, kv_heads, s_k, d].
        value: [b, kv_heads, s_k, d_v].
        mask: which keys a query sees; None lets it see all. Dense only where the model made it so.
        bias: added to scores, broadcast to [b, heads, s_q, s_k], with a gradient if it wants one; -inf hides a key.
        scale: of scores; None stands for d^-1/2.
        softcap: c of c tanh(score / c), before the bias.
        sinks: [heads], a score of no value that takes part in the softmax (arXiv 2309.17453).
        dropout_p: probability with which a weight is dropped after the softmax.
        module: who asks.
        name: path of `module` in the model.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None = None
    bias: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    module: nn.Module
    name: str = ""


Handler = Callable[[AttentionCall], Tensor]
"""Computes a call: gives [b, heads, s_q, d_v]."""

_ATTRIBUTE = "_meshwright_plug"
_CALLING: ContextVar["_Calling | None"] = ContextVar("calling", default=None)


@dataclass(frozen=True, eq=False)
class _Calling:
    """A module whose forward runs, and the one it was called by."""

    module: nn.Module
    outer: "_Calling | None"


class _Member:
    """What a module of a plugged model carries; a copy of the module that takes it along is none."""

    __slots__ = ("module", "path", "plug")

    def __init__(self, plug: "Plug", module: nn.Module, path: str) -> None:
        self.plug = plug
        self.module = ref(module)
        self.path = path

    def __deepcopy__(self, memo: Any) -> "_Member":
        del memo
        return self

    def __reduce__(self) -> Any:
        return type(None), ()


class Plug:
    """Sends the attention calls of one model to a handler, as long as it is in.

    Args:
        model: any; copies of it that are made later are not plugged.
        handler: what computes calls.

    Attributes:
        arrived: path of a module -> how its calls arrive, as far as it called.
    """

    def __init__(self, model: nn.Module, handler: Handler) -> None:
        self.arrived: dict[str, str] = {}
        self._members = [_Member(self, module, path) for path, module in model.named_modules()]
        self._handler = handler
        self._hooks: list[RemovableHandle] = []

    @property
    def modules(self) -> list[nn.Module]:
        """Every module of the model that is still there."""
        return [module for each in self._members if (module := each.module()) is not None]

    def put_in(self) -> None:
        """Sends calls from here on.

        Raises:
            WrapError: for a model with a module that is plugged already.
        """
        members = [(each, module) for each in self._members if (module := each.module()) is not None]
        for each, module in members:
            if plug_of(module) is not None and (not each.path or _holds_something(module)):
                raise WrapError(
                    f"the attention of module {each.path or '(the model)'} goes somewhere already; remove that plug "
                    "first"
                )
        for each, module in members:
            if plug_of(module) is None:  # else it is a function that several models share
                self._mark(each, module)

    def _mark(self, each: _Member, module: nn.Module) -> None:
        module.__dict__[_ATTRIBUTE] = each
        if any(True for _ in module.children()) or not each.path:
            self._hooks.append(module.register_forward_pre_hook(_enter, prepend=True))
            self._hooks.append(module.register_forward_hook(_leave, always_call=True))

    def take_out(self) -> None:
        """Makes the model's modules what they were."""
        for hook in self._hooks:
            hook.remove()
        for each in self._members:
            module = each.module()
            if module is not None and module.__dict__.get(_ATTRIBUTE) is each:
                del module.__dict__[_ATTRIBUTE]
        self._hooks = []

    def compute(self, module: nn.Module, how: str, **what: Any) -> Tensor:
        """Has the handler compute a call; calls that the handler makes itself are ordinary ones.

        Args:
            module: of this model.
            how: through what the call arrived, for reports.
            what: the other fields of `AttentionCall`.
        """
        calling = calling_module()
        if calling is not None and calling[0] is not self:  # a function that several models share
            return calling[0].compute(module, how, **what)
        name = path_of(module)
        self.arrived.setdefault(name, how)
        outside = _CALLING.set(None)
        try:
            return self._handler(AttentionCall(module=module, name=name, **what))
        finally:
            _CALLING.reset(outside)


def _holds_something(module: nn.Module) -> bool:
    return any(True for held in (module.children(), module.parameters(), module.buffers()) for _ in held)


def plug_of(module: nn.Module) -> Plug | None:
    """The plug of the model that a module belongs to, if there is one."""
    member: _Member | None = module.__dict__.get(_ATTRIBUTE)
    return member.plug if member is not None and member.module() is module else None


def path_of(module: nn.Module) -> str:
    """Where a module of a plugged model is."""
    member: _Member = module.__dict__[_ATTRIBUTE]
    return member.path


def calling_module() -> tuple[Plug, nn.Module] | None:
    """The innermost module with children whose forward runs here, if it is one of a plugged model."""
    calling = _CALLING.get()
    if calling is None:
        return None
    plug = plug_of(calling.module)
    return None if plug is None else (plug, calling.module)


@contextmanager
def called(module: nn.Module) -> Iterator[None]:
    """Inside, a module's forward may be run without a call of it, and may be left by what no hook sees."""
    before = _CALLING.set(_Calling(module, _CALLING.get()))
    try:
        yield
    finally:
        _CALLING.reset(before)


def has_hooks(module: nn.Module) -> bool:
    """Whether something waits for calls of the modules in a module, besides a plug.

    >>> inner = nn.Linear(2, 2)
    >>> _, before = inner.register_forward_hook(print), has_hooks(inner)
    >>> before, has_hooks(nn.Sequential(inner))
    (False, True)
    """
    return any(is_hooked(each) for each in module.modules() if each is not module)


def is_hooked(module: nn.Module) -> bool:
    """Whether something waits for calls of a module, besides a plug."""
    own = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(hook not in (_enter, _leave) for hook in own) or bool(
        module._backward_hooks or module._backward_pre_hooks
    )


def name_of_calling() -> str:
    """Path of the innermost module of a plugged model whose forward runs here, of those that have children."""
    calling = calling_module()
    return "" if calling is None else path_of(calling[1])


# Functions and not methods: copies of a module take its hooks along, and must not take a plug along.


def _enter(module: nn.Module, args: Any) -> None:
    del args
    _CALLING.set(_Calling(module, _CALLING.get()))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    del args, output
    calling = _CALLING.get()
    while calling is not None and calling.module is not module:  # left by an exception that skips hooks
        calling = calling.outer
    if calling is not None:
        _CALLING.set(calling.outer)
