"""What torch keeps for a thread: gradient mode, autocast, function modes, hooks on saved tensors, random generators.

Two passes through a model that take turns in one thread each have their own.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

__all__ = ["ThreadState", "aside"]

Result = TypeVar("Result")


def aside(work: Callable[..., Result], *args: Any) -> Result:
    """Does something in a thread of its own, where torch has its defaults: gradients, no hooks, modes or autocast.

    >>> with torch.no_grad():
    ...     aside(torch.is_grad_enabled)
    True
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work, *args).result()


class ThreadState:
    """What torch keeps for a thread, as it is now.

    Args:
        random: generators too, which take longer than all the rest.

    Attributes:
        grad: whether histories are kept.

    >>> before = ThreadState()
    >>> with torch.no_grad():
    ...     before.enter()
    ...     torch.is_grad_enabled()
    True
    """

    def __init__(self, *, random: bool = True) -> None:
        self.grad = torch.is_grad_enabled()
        self._random = torch.default_generator.get_state() if random else None
        self._cuda_random = torch.cuda.get_rng_state() if random and torch.cuda.is_initialized() else None
        self._autocast = _autocast_settings()
        number = torch._C._len_torch_function_stack()
        self._modes = [torch._C._get_function_stack_at(place) for place in range(number)]
        self._hooks = _taken_hooks()
        if self._hooks:
            _put_hooks(self._hooks)

    def enter(self, now: "ThreadState | None" = None) -> None:
        """Puts it back.

        Args:
            now: what is there, if that is known: what is the same stays.
        """
        torch.set_grad_enabled(self.grad)
        self._put_random()
        torch.clear_autocast_cache()  # a cast made in one pass must not be used in another
        if now is None or now._autocast != self._autocast:
            _put_autocast(self._autocast)
        if now is None or now._modes or self._modes:
            _put_modes(self._modes)
        if now is None or now._hooks or self._hooks:
            _taken_hooks()
            _put_hooks(self._hooks)

    def differs(self, other: "ThreadState") -> str:
        """What another one has otherwise, in words; random numbers apart."""
        found = {
            "gradient mode": self.grad is not other.grad,
            "autocast": self._autocast != other._autocast,
            "function modes": [*map(id, self._modes)] != [*map(id, other._modes)],
            "hooks on saved tensors": _ids(self._hooks) != _ids(other._hooks),
        }
        return " and ".join(what for what, is_so in found.items() if is_so)

    def _put_random(self) -> None:
        if self._random is not None:
            torch.default_generator.set_state(self._random)
        if self._cuda_random is not None:
            torch.cuda.set_rng_state(self._cuda_random)


def _autocast_settings() -> tuple[bool, torch.dtype, bool, torch.dtype]:
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
    )


def _put_autocast(settings: tuple[bool, torch.dtype, bool, torch.dtype]) -> None:
    for device, enabled, dtype in (("cpu", *settings[:2]), ("cuda", *settings[2:])):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def _put_modes(modes: list[Any]) -> None:
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


def _taken_hooks() -> list[Any]:
    """Takes the hooks on saved tensors (recompute, offload) off, the innermost first."""
    autograd: Any = torch._C._autograd
    hooks = []
    while (top := autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        autograd._pop_saved_tensors_default_hooks()
    return hooks


def _ids(hooks: list[Any]) -> list[int]:
    return [id(each) for pair in hooks for each in pair]  # the pairs are made anew whenever they are asked for


def _put_hooks(hooks: list[Any]) -> None:
    for pack, unpack in reversed(hooks):
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
