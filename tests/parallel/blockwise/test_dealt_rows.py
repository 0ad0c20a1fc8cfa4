"""A loss whose rows are dealt is whole on every rank, and so are its gradients; each does its share of the work."""

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import meshwright as mw
from meshwright.parallel.blockwise.dealt_rows import DealtRows
from meshwright.parallel.blockwise.entropy import Entropy, blockwise_cross_entropy
from meshwright.parallel.blockwise.loss import tile_loss
from meshwright.parallel.blockwise.product import Product
from meshwright.parallel.collectives import Groups
from meshwright.parallel.errors import WrapError
from meshwright.parallel.exchange import enter
from meshwright.parallel.following import Call
from meshwright.parallel.loss import items_of_graph
from meshwright.parallel.threads import ThreadAxis, run_threads
from meshwright.parallel.vocabulary import own_range
from meshwright.testing import run_ranks
from tests.parallel.cells import layout_of, tiered
from tests.parallel.families import FAMILIES, lm, words
from tests.parallel.models import VOCABULARY

ROWS, INPUTS, CLASSES = 11, 4, 13
CALL = Entropy(Product(steps=(Call(torch.tanh, (), {}),)), CLASSES, block=2, dtype=torch.float64)
IGNORED = -7
TARGETS = {
    "all count": torch.arange(ROWS) % CLASSES,
    "some ranks have few": torch.tensor([3, IGNORED, 4, IGNORED, 7, IGNORED, 12, 0, 1, 5, IGNORED]),
    "one counts": torch.tensor([IGNORED] * 10 + [12]),
    "none counts": torch.full((ROWS,), IGNORED),
}


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((ROWS, INPUTS), (CLASSES, INPUTS), (CLASSES,))
    hidden, weight, bias = (torch.randn(each, dtype=torch.float64, generator=generator) for each in shapes)
    return hidden, weight, bias


def _loss(call: Entropy, inputs: Any, target: Tensor) -> Tensor:
    return blockwise_cross_entropy(call, inputs[0], target, weight=inputs[1], bias=inputs[2])


def _fresh(like: Any) -> list[Tensor]:
    return [each.detach().clone().requires_grad_() for each in like]


@pytest.mark.parametrize("degree", [2, 3, 13])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_rank_has_the_whole_loss_and_whole_gradients(degree: int, targets: str, reduction: str) -> None:
    target = TARGETS[targets]
    for in_advance, block in product((False, True), (1, 2, 100)):
        call = replace(CALL, in_advance=in_advance, block=block, reduction=reduction, ignore_index=IGNORED)
        inputs = _fresh(_inputs())
        scores = functional.linear(*inputs).tanh()
        plain = functional.cross_entropy(scores, target, ignore_index=IGNORED, reduction=reduction)
        weights = torch.arange(1.0, 1.0 + plain.numel(), dtype=torch.float64).view(plain.shape)
        expected = torch.autograd.grad(plain, inputs, weights)

        def work(
            axis: ThreadAxis, call: Entropy = call, given: list[Tensor] = inputs, weights: Tensor = weights
        ) -> Any:
            mine = _fresh(given)
            loss = _loss(replace(call, rows=axis), mine, target)
            return loss, items_of_graph(loss), torch.autograd.grad(loss, mine, weights)

        for loss, items, found in run_threads(work, degree):
            torch.testing.assert_close(loss, plain, rtol=1e-13, atol=1e-14, equal_nan=True)
            assert items == (target != IGNORED).sum()
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14, equal_nan=True)


def test_shares_are_even_and_in_order() -> None:
    found: list[Any] = run_threads(lambda axis: DealtRows(axis, 11).own, 4)
    assert [(each.start, each.stop) for each in found] == [(0, 3), (3, 6), (6, 9), (9, 11)]
    assert all(one.stop == other.start for one, other in pairwise(found))
    rows = torch.arange(6.0).view(3, 2)
    assert DealtRows(None, 3).taken(rows) is DealtRows(None, 3).joined(rows) is rows


class _Work(TorchDispatchMode):
    """Multiplications of the head's products, and rows of the largest scores."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.multiplied = 0
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            one, other = args[-2:]
            self.multiplied += one.shape[0] * one.shape[1] * other.shape[1]
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and each.dim() == 2 and each.shape[1] == CLASSES and each.shape[0] != INPUTS:
                self.rows = max(self.rows, each.shape[0])
        return made


@pytest.mark.parametrize("in_advance", [False, True])
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_multiplications_and_the_memory_of_scores_fall_by_the_number_of_ranks(degree: int, in_advance: bool) -> None:
    number = 24
    target = torch.arange(number) % CLASSES

    def work(axis: ThreadAxis) -> Any:
        hidden = torch.randn(number, INPUTS, dtype=torch.float64)
        mine = _fresh((hidden, *_inputs()[1:]))
        call = replace(CALL, block=1000, rows=axis, in_advance=in_advance)
        with _Work() as seen:
            loss = _loss(call, mine, target)
            held = [each.untyped_storage().nbytes() for each in _saved(loss) if each.shape[-1:] == (INPUTS,)]
            loss.backward()
        return seen.multiplied, seen.rows, held[0]

    products = 3 if in_advance else 4
    for multiplied, rows, held_bytes in run_threads(work, degree):
        assert multiplied == products * number * INPUTS * CLASSES // degree
        assert rows == number // degree
        assert held_bytes == number // degree * INPUTS * 8


def _saved(loss: Tensor) -> list[Tensor]:
    assert loss.grad_fn is not None
    return list(loss.grad_fn.saved_tensors)  # type: ignore[attr-defined]


def test_what_is_sent_is_a_number_the_gradient_of_rows_and_the_sums_of_parameters() -> None:
    target = TARGETS["some ranks have few"]

    def work(axis: ThreadAxis) -> Any:
        hidden, weight, bias = _fresh(_inputs())
        call = replace(CALL, ignore_index=IGNORED, rows=axis)
        loss = _loss(call, (hidden, weight, bias), target)
        forward = list(axis.calls)
        torch.autograd.grad(loss, hidden, retain_graph=True)
        of_rows = axis.calls[len(forward) :]
        torch.autograd.grad(loss, [weight, bias])
        return forward, of_rows, axis.calls[len(forward) + len(of_rows) :]

    sums = [("all_reduce", CLASSES * INPUTS), ("all_reduce", CLASSES)]
    for forward, of_rows, of_parameters in run_threads(work, 2):
        assert forward == [("all_reduce", 1)]
        assert of_rows == [("all_gather", 12 * INPUTS)]  # 11 rows, the share of the second rank padded
        assert of_parameters == sums


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {0, 1, 2}])
def test_what_is_frozen_is_not_summed(frozen: set[int]) -> None:
    def work(axis: ThreadAxis) -> Any:
        inputs = [each.requires_grad_(number not in frozen) for number, each in enumerate(_fresh(_inputs()))]
        inputs = [each.detach() if number in frozen else each for number, each in enumerate(inputs)]
        loss = _loss(replace(CALL, rows=axis), inputs, TARGETS["all count"])
        if loss.requires_grad:
            loss.backward()
        return len(axis.calls), {number for number, each in enumerate(inputs) if each.grad is None}

    assert run_threads(work, 2) == [(4 - len(frozen), frozen)] * 2


def test_sums_of_narrow_parameters_are_rounded_once() -> None:
    torch.manual_seed(0)
    rows, target = torch.randn(2048, 16).bfloat16(), torch.randint(0, 64, (2048,))
    weight = torch.randn(64, 16).bfloat16()

    def gradient(axis: ThreadAxis | None) -> Tensor:
        head = nn.Linear(16, 64, bias=False).bfloat16()
        head.weight = nn.Parameter(weight.clone())
        tile_loss(head, 64, heads=[""], rows=axis)
        loss = functional.cross_entropy(head(rows).float(), target)
        loss.backward()
        assert (loss.dtype, head.weight.grad is None) == (torch.float32, False)
        found: Tensor = head.weight.grad  # type: ignore[assignment]
        return found.float()

    alone = gradient(None)
    for found in run_threads(gradient, 4):
        torch.testing.assert_close(found, alone, rtol=0.01, atol=1e-6)  # one step of bfloat16 is 0.8 %


@pytest.mark.parametrize("what", ["rows", "their order", "targets", "nothing"])
def test_rows_that_differ_between_ranks_are_refused_at_first_use(what: str) -> None:
    rows, target = torch.randn(6, INPUTS), torch.arange(6)

    def work(axis: ThreadAxis) -> None:
        head = nn.Linear(INPUTS, CLASSES)
        tile_loss(head, 2, heads=[""], rows=axis)
        given, targets = rows.clone(), target.clone()
        if axis.rank == 1:
            given[3] += float(what == "rows")
            targets[5] -= int(what == "targets")
            given = given.flip(0) if what == "their order" else given
        functional.cross_entropy(head(given), targets)

    if what == "nothing":
        run_threads(work, 2)
        return
    with pytest.raises(WrapError, match=r"ranks of cp give a head different rows.* deal the batch over dp"):
        run_threads(work, 2)


def test_a_second_derivative_of_dealt_rows_is_refused() -> None:
    def work(axis: ThreadAxis) -> None:
        inputs = _fresh(_inputs())
        loss = _loss(replace(CALL, rows=axis), inputs, TARGETS["all count"])
        torch.autograd.grad(loss, inputs, create_graph=True)

    with pytest.raises(WrapError, match=r"second derivatives .* rows are dealt over cp .* use cp=1"):
        run_threads(work, 2)


def _few(mesh: mw.Mesh) -> list[tuple[Tensor, ...]]:
    groups, found = Groups(mesh), []
    classes, rows = groups.axis("tp"), groups.axis("cp")
    start, stop = own_range(CLASSES, classes)
    for number in (0, 1, 3, ROWS):
        hidden, weight, bias = _inputs()
        mine = _fresh((hidden[:number], weight[start:stop], bias[start:stop]))
        call = replace(CALL, axis=classes, span=(start, stop), rows=rows, ignore_index=IGNORED)
        loss = _loss(call, (enter(mine[0], classes), *mine[1:]), TARGETS["some ranks have few"][:number])
        loss.backward()
        found.append((loss.detach(), *(each.grad for each in mine if each.grad is not None)))
    return found


def test_few_rows_and_dealt_classes_on_real_ranks_are_torch_s() -> None:
    mesh = mw.Mesh(cp=2, tp=2)
    ranks = run_ranks(_few, mesh, mesh)
    for place, number in enumerate((0, 1, 3, ROWS)):
        hidden, weight, bias = _fresh(_inputs())
        scores = functional.linear(hidden[:number], weight, bias).tanh()
        plain = functional.cross_entropy(scores, TARGETS["some ranks have few"][:number], ignore_index=IGNORED)
        plain.backward()
        for rank, found in enumerate(ranks):
            loss, of_rows, of_weight, of_bias = found[place]
            own = slice(0, 7) if rank % 2 == 0 else slice(7, CLASSES)
            torch.testing.assert_close(loss, plain.detach(), rtol=1e-13, atol=0, equal_nan=True)
            assert hidden.grad is not None
            assert weight.grad is not None
            assert bias.grad is not None
            expected = (hidden.grad[:number], weight.grad[own], bias.grad[own])
            for one, other in zip((of_rows, of_weight, of_bias), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


SIZES: dict[str, int] = {"loss_block": 7}
TIED = (lm("llama", num_key_value_heads=2, tie_word_embeddings=True), words)
CAPPED = (lm("gemma3_text", num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0), words)
MODELS: dict[str, Any] = {**FAMILIES, "llama, tied": TIED, "gemma3, capped": CAPPED}
LAYOUTS: tuple[tuple[str, dict[str, int], dict[str, Any]], ...] = (
    ("llama", {"cp": 4}, {"cp_kind": "ring"}),
    ("llama, tied", {"cp": 2, "tp": 2}, {"num_microbatches": 2}),
    ("gemma3, capped", {"cp": 2, "dp": 2}, {"num_microbatches": 2, "cp_kind": "ring"}),
    ("bert", {"cp": 2}, {"num_microbatches": 3, "blockwise": {**SIZES, "loss_in_advance": True}}),
    ("t5", {"cp": 2, "dp": 2}, {"cp_kind": "gather"}),
    ("gpt2", {"cp": 2, "fsdp": 2}, {"schedule": "layered", "num_microbatches": 2}),
    ("qwen3", {"cp": 2, "pp": 2}, {"schedule": "zb-h1", "num_microbatches": 2}),
    ("modernbert", {"cp": 2}, {"cp_kind": "ring"}),
    ("whisper", {"cp": 2, "fsdp": 2}, {}),
    ("mixtral", {"cp": 2, "pp": 2}, {"schedule": "modular", "num_microbatches": 2}),
    ("llama", {"cp": 2, "tp": 2, "fsdp": 2}, {"schedule": "layered", "num_microbatches": 2}),
)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "degrees", "options"), tiered(LAYOUTS, layout_of), ids=str)
def test_models_whose_loss_is_shared_equal_the_plain_run(
    family: str, degrees: dict[str, int], options: dict[str, Any]
) -> None:
    build, batch = MODELS[family]
    report = mw.verify(build, batch, mw.Mesh(**degrees), **{"blockwise": SIZES, **options})
    assert report.ok, str(report)
    assert not report.notes


def _sent(sizes: dict[str, int] | None) -> Any:
    batch = words(6, 10)
    model = mw.parallelize(TIED[0](), mw.Mesh(cp=2), blockwise=sizes, num_microbatches=2, example=batch)
    model.step(batch)
    head = model.module.get_submodule("lm_head").forward
    _, ledger = model.ledger_step(batch)
    kinds = ("all_reduce", "all_gather")
    return (
        [(ledger.count(kind), ledger.payload_bytes(kind)) for kind in kinds],
        getattr(head, "uses", None),
        model.report.notes,
    )


@pytest.mark.slow
def test_a_step_sends_what_the_shares_need_and_nothing_more() -> None:
    whole, shared = (run_ranks(_sent, mw.Mesh(cp=2), sizes)[0] for sizes in (None, SIZES))
    (reduced, gathered), (reduced_shared, gathered_shared) = whole[0], shared[0]
    hidden, rows = 32, 3 * 10  # of a micro-batch
    assert reduced_shared[0] - reduced[0] == 2 * 2
    assert reduced_shared[1] - reduced[1] == 2 * (4 + 4 * VOCABULARY * hidden)
    assert gathered_shared[0] - gathered[0] == 2
    assert gathered_shared[1] - gathered[1] == 2 * 4 * rows * hidden
    assert shared[1] == {"cross_entropy by blocks": 2 * 2}
    assert "cross entropy in blocks of 7 rows of scores: lm_head, each of 2 ranks its share of the rows" in shared[2]


def _evaluated(sizes: dict[str, int] | None) -> list[float]:
    model = mw.parallelize(TIED[0](), mw.Mesh(cp=2), blockwise=sizes, example=words(6, 10))
    return [float(each) for each in model.evaluate(words(6, 10))]


def test_evaluation_shares_rows_too() -> None:
    whole, shared = (run_ranks(_evaluated, mw.Mesh(cp=2), sizes) for sizes in (None, SIZES))
    assert whole[0][1] == shared[0][1] == float((words(6, 10)["labels"][:, 1:] != -100).sum())
    assert shared[0] == shared[1]
    assert shared[0][0] == pytest.approx(whole[0][0], rel=1e-6)


def _head_gradient(mesh: mw.Mesh, dtype: torch.dtype) -> Tensor:
    sizes = SIZES if mesh.cp > 1 else None
    model = mw.parallelize(TIED[0]().to(dtype), mesh, blockwise=sizes, example=words(8, 16), num_microbatches=2)
    model.step(words(8, 16))
    gradient = model.full_gradients()["model.embed_tokens.weight"]
    assert gradient is not None
    return gradient.double()


@pytest.mark.slow
def test_bfloat16_is_as_near_to_the_exact_gradients_as_the_plain_run() -> None:
    one, two = mw.Mesh(), mw.Mesh(cp=2)
    exact = run_ranks(_head_gradient, one, one, torch.float64)[0]
    plain, shared = (run_ranks(_head_gradient, mesh, mesh, torch.bfloat16)[0] for mesh in (one, two))
    errors = [float((each - exact).norm() / exact.norm()) for each in (plain, shared)]
    assert errors[1] <= 1.2 * errors[0]
