"""What a training step takes of memory at any length: the real code on tensors without values, live storages added up.

What kernels use inside of one call is not seen.
"""

import gc
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import masking_utils

from benchmarks.long_models import Step
from meshwright.parallel.footprint import Live
from meshwright.parallel.meta import MetaAnswers

__all__ = ["counted_peak_bytes"]


class _Usual(TorchFunctionMode):
    """A context in which tensors without values are not zero, and states of generators are as they were."""

    def __torch_function__(self, func: Any, *given: Any) -> Any:
        """Answers a question, passes every other call on."""
        _, args, *keywords = given
        if func is Tensor.__bool__ and isinstance(args[0], FakeTensor):
            return False
        if func is torch.equal and any(isinstance(each, FakeTensor) for each in args):
            return True
        return func(*args, **(keywords[0] if keywords else {}))


def counted_peak_bytes(module: nn.Module, step: Step) -> int:
    """Peak of a step, parameters, buffers and gradients of `module` included; its optimizer has its states already.

    Masks are as in a run with values: `transformers` would make them whole where it takes a run for a trace.
    """
    module.zero_grad()
    gc.collect()
    not_a_trace = patch.object(masking_utils, "is_tracing", lambda *_: False)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with not_a_trace, fakes, _Usual(), MetaAnswers(), Live() as live:
        held = [fakes.from_tensor(each) for each in (*module.parameters(), *module.buffers())]
        for each in held:
            live.note(each.untyped_storage())
        live.peak_bytes = live.now_bytes
        step()
        found = live.peak_bytes
    module.zero_grad()
    return found
