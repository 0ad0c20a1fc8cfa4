"""Models with checkpoints of their own: at work on every mesh, with the plain run's gradients, and out of proofs."""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import meshwright as mw
from meshwright.parallel.errors import WrapError
from meshwright.parallel.keeping import kept
from meshwright.testing import run_ranks
from tests.parallel.models import llama, tokens

_WIDTH = 8


class _Checkpointed(nn.Module):
    """Subclasses run their forward again in backward, as layers of transformers do."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        forward = cls.forward

        @wraps(forward)
        def outer(self: nn.Module, values: Tensor) -> Tensor:
            if type(self).forward is not outer:
                return forward(self, values)
            made: Tensor = checkpoint(forward, self, values, use_reentrant=False)
            return made

        cls.forward = outer


class _Whole(_Checkpointed):
    """A block that is one checkpoint."""

    calls = 0

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)
        self.dropout = dropout

    def forward(self, values: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]"""
        _Whole.calls += 1
        made = self.narrow(self.wide(values).float().tanh().to(values.dtype))
        return values + nn.functional.dropout(made, self.dropout, self.training)


class _Inside(nn.Module):
    """A block with a checkpoint in the midst of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(_WIDTH, _WIDTH), _Whole(), nn.Linear(_WIDTH, _WIDTH)

    def forward(self, values: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]"""
        return self.last(checkpoint(self.inner, self.first(values), use_reentrant=False).tanh())


class _Model(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], *, around: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(4))
        self.around = around

    def forward(self, values: Tensor, labels: Tensor) -> Tensor:
        """Mean over labels."""
        for layer in self.layers:
            values = checkpoint(layer, values, use_reentrant=False) if self.around else layer(values)
        return nn.functional.cross_entropy(values.transpose(1, 2), labels)


def _built(block: Callable[[], nn.Module], *, around: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return _Model(block, around=around)


def _batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, _WIDTH, (4, 6), generator=generator)
    return {"values": torch.randn(4, 6, _WIDTH, generator=generator), "labels": labels}


def _llama(reentrant: bool) -> nn.Module:
    model: Any = llama(num_hidden_layers=4)()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it gets a new name in version 6
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


MODELS = {
    "llama": (lambda: _llama(reentrant=False), tokens(4)),
    "llama, reentrant": (lambda: _llama(reentrant=True), tokens(4)),
    "whole blocks": (lambda: _built(_Whole), _batch),
    "inside of blocks": (lambda: _built(_Inside), _batch),
    "around blocks": (lambda: _built(_Inside, around=True), _batch),
}
MESHES: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"dp": 2}, {}),
    ({}, {"schedule": "layered", "num_microbatches": 2}),
    ({"fsdp": 2}, {"schedule": "layered", "num_microbatches": 2}),
]
TP: list[tuple[dict[str, int], dict[str, Any]]] = [({"tp": 2}, {}), ({"tp": 2}, {"sequence_parallel": True})]
CP: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"cp": 2}, {}),
    ({"cp": 2}, {"schedule": "layered", "num_microbatches": 2}),
    ({"pp": 2, "cp": 2}, {"schedule": "modular", "num_microbatches": 2}),
]
PP: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"pp": 2}, {"schedule": "1f1b", "num_microbatches": 2}),
    ({"pp": 2}, {"schedule": "zb-h1", "num_microbatches": 2}),
]
CASES = [
    *((name, *layout) for name in MODELS for layout in MESHES),
    *((name, *layout) for name in ("llama", "whole blocks") for layout in TP),
    *(("llama", *layout) for layout in CP),
    *((name, *layout) for name in ("llama", "whole blocks", "inside of blocks") for layout in PP),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "degrees", "options"), CASES, ids=str)
def test_a_model_with_checkpoints_has_the_plain_run_s_gradients(
    name: str, degrees: dict[str, int], options: dict[str, Any]
) -> None:
    build_model, build_batch = MODELS[name]
    report = mw.verify(build_model, build_batch, mw.Mesh(**degrees), **options)
    assert report.ok, str(report)


def _counted(options: dict[str, Any]) -> int:
    model = mw.parallelize(_built(_Whole), mw.Mesh(), **options)
    model.step(_batch())
    _Whole.calls = 0
    model.step(_batch())
    return _Whole.calls


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"schedule": "layered", "num_microbatches": 2}], ids=str)
def test_a_block_that_is_a_checkpoint_runs_twice_under_a_schedule_too(options: dict[str, Any]) -> None:
    microbatches = options.get("num_microbatches", 1)
    assert run_ranks(_counted, mw.Mesh(), options) == [2 * 4 * microbatches]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"schedule": "layered", "num_microbatches": 2}], ids=str)
def test_dropout_of_a_part_in_a_checkpoint_of_a_block_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(WrapError, match="would draw another mask when backward runs it again"):
        mw.verify(lambda: _built(lambda: _Whole(0.3)), _batch, mw.Mesh(tp=2), sequence_parallel=True, **options)


@pytest.mark.slow
def test_dropout_in_a_checkpoint_is_the_plain_run_s_where_a_rank_has_all_of_a_tensor() -> None:
    for degrees, options in (*MESHES, PP[0]):
        report = mw.verify(lambda: _built(lambda: _Whole(0.3)), _batch, mw.Mesh(**degrees), **options)
        assert report.ok, str(report)


def test_nothing_of_a_kept_module_runs_again_in_backward() -> None:
    block, values = _Whole(), torch.randn(1, 2, _WIDTH, requires_grad=True)
    found = []
    for keeping in (False, True):
        _Whole.calls = 0
        if keeping:
            with kept(block):
                made = block(values)
        else:
            made = block(values)
        found.append((*torch.autograd.grad(made.sum(), [values, *block.parameters()]), _Whole.calls))
    (*plain, twice), (*mine, once) = found
    assert (twice, once) == (2, 1)
    assert all(torch.equal(one, other) for one, other in zip(plain, mine, strict=True))
