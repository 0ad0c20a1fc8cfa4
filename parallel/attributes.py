"""Values that a model keeps on its modules while a pass is stopped, where the next micro-batch would find them."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from meshwright.parallel.errors import WrapError

__all__ = ["Attributes"]

_OWN = ("_parameters", "_buffers", "_modules")


class Attributes:
    """Watches attributes of a model's modules in the first step.

    Args:
        model: looked at between stops of its passes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._before: dict[tuple[str, str], Any] = {}
        self._writers: dict[tuple[str, str], int] = {}

    def note(self) -> None:
        """What is there before a pass goes on."""
        self._before = dict(self._values())

    def check(self, writer: int) -> None:
        """Refuses tensors that two passes put in one place, each stopped before the other is through.

        Args:
            writer: micro-batch that went on.

        Raises:
            WrapError: naming the attribute.
        """
        for place, value in self._values():
            if not _holds_tensor(value) or self._before.get(place) is value:
                continue
            if self._writers.setdefault(place, writer) != writer:
                module, name = place
                raise WrapError(
                    f"module {module or '(the model)'} keeps a tensor in its attribute {name!r} during forward; "
                    "schedules run micro-batches in turns, so one would find what another left there; hand it over as "
                    "an argument, or use schedule='accumulate'"
                )

    def _values(self) -> Iterator[tuple[tuple[str, str], Any]]:
        for path, module in self._modules.items():
            for name, value in vars(module).items():
                if name not in _OWN:
                    yield (path, name), value


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(isinstance(each, Tensor) for each in value)
    return isinstance(value, Tensor)
