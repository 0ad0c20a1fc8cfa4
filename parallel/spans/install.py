"""Makes the blocks of a model run by spans, as far as it is proved that they may (see `settle_blocks`)."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from meshwright.parallel.blocks import find_blocks
from meshwright.parallel.blockwise.answer import attend_to
from meshwright.parallel.blockwise.calls import AttentionCall, Handler
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.context.planner import Settled, settle_blocks
from meshwright.parallel.errors import WrapError
from meshwright.parallel.spans.answers import Answers
from meshwright.parallel.spans.arguments import Dims
from meshwright.parallel.spans.block import SpannedBlock
from meshwright.parallel.tensor_plan import starred
from meshwright.parallel.unit_calls import calls_of

__all__ = ["Spanned", "plan_spans", "span_blocks"]


@dataclass(frozen=True)
class Spanned:
    """Which blocks run by spans.

    Attributes:
        blocks: path -> what was settled of it.
        whole: path -> why it does not.
    """

    blocks: Mapping[str, Settled]
    whole: Mapping[str, str]

    def lines(self, sizes: Blockwise) -> list[str]:
        """What a report says."""
        most = sizes.layer_block or 0
        found = [f"blocks in spans of {most:,} positions, attention once: {_named(self.blocks)}"]
        return found + [f"not in spans: {_named([path])}: {reason}" for path, reason in self.whole.items()]


def plan_spans(model: nn.Module, run: Callable[[], Any], *, shapes: bool = False) -> Spanned:
    """Finds out which blocks may run by spans.

    Args:
        model: whole; it is not changed.
        run: one forward pass of it on an example.
        shapes: try them on shapes alone, which is fast and proves no numbers: for what is not going to be trained.

    Raises:
        WrapError: where none may.
    """
    settled = settle_blocks(model, calls_of(model, run, list(find_blocks(model))), degree=2, shapes=shapes)
    whole = {path: reason for path, each in settled.items() if (reason := _why_not(each)) is not None}
    if len(whole) == len(settled):
        first = next((f" ({path}: {reason})" for path, reason in whole.items()), ": it has no list of blocks")
        raise WrapError(f"blockwise: layer_block fits no block of the model{first}; use ffn_block, or leave it out")
    return Spanned({path: each for path, each in settled.items() if path not in whole}, whole)


def span_blocks(model: nn.Module, spanned: Spanned, sizes: Blockwise) -> Handler:
    """Makes blocks run by spans; returns what computes the attention of the model.

    Args:
        model: changed in place.
        spanned: which of its blocks.
        sizes: of blocks; with `layer_block`.
    """
    assert sizes.layer_block is not None, sizes
    handlers: dict[str, Handler] = {}
    for path, each in spanned.blocks.items():
        assert each.plan is not None, path
        assert each.stream is not None, path
        block = model.get_submodule(path)
        attends = {f"{path}.{name}".strip("."): how for name, how in each.plan.attends.items()}
        answers = Answers(attends, sizes)
        forward = SpannedBlock(
            path, block, block.forward, each.stream, _dims(each), each.kinds, sizes.layer_block, answers
        )
        block.forward = forward
        handlers |= dict.fromkeys(attends, answers)

    def answered(asked: AttentionCall) -> Tensor:
        handler = handlers.get(asked.name)
        return attend_to(asked, sizes) if handler is None else handler(asked)

    return answered


def _why_not(settled: Settled) -> str | None:
    if settled.plan is None or settled.stream is None:
        return settled.reason
    if settled.plan.joined:
        return f"{', '.join(settled.plan.joined)} looks at the whole sequence, besides by its attention"
    return None if settled.only_streams else "it gives something besides the stream"


def _dims(settled: Settled) -> Dims:
    assert settled.plan is not None, settled.reason
    assert settled.stream is not None, settled.reason
    return {settled.stream: (-2,), **dict(settled.plan.dealt.get("", ()))}


def _named(paths: Any) -> str:
    patterns = Counter(starred(path) for path in paths)
    return ", ".join(pattern if number == 1 else f"{number} x {pattern}" for pattern, number in patterns.items())
