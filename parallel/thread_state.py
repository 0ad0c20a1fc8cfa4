"""What torch keeps for a thread: gradient mode, autocast, function modes, hooks on saved tensors, random generators.

Two passes through a model that take turns in one thread each have their own.
"""

from typing import Any

import torch

__all__ = ["ThreadState"]


class ThreadState:
    """What torch keeps for a thread, as it is now.

    >>> before = ThreadState()
    >>> with torch.no_grad():
    ...     before.enter()
    ...     torch.is_grad_enabled()
    True
    """

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._random = torch.get_rng_state()
        self._cuda_random = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        self._autocast = {
            device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
        }
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
        torch.set_grad_enabled(self._grad)
        torch.set_rng_state(self._random)
        if self._cuda_random is not None:
            torch.cuda.set_rng_state(self._cuda_random)
        torch.clear_autocast_cache()  # a cast made in one pass must not be used in another
        if now is None or now._autocast != self._autocast:
            _put_autocast(self._autocast)
        if now is None or now._modes or self._modes:
            _put_modes(self._modes)
        if now is None or now._hooks or self._hooks:
            _taken_hooks()
            _put_hooks(self._hooks)


def _put_autocast(settings: dict[str, tuple[bool, torch.dtype]]) -> None:
    for device, (enabled, dtype) in settings.items():
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


def _put_hooks(hooks: list[Any]) -> None:
    for pack, unpack in reversed(hooks):
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
