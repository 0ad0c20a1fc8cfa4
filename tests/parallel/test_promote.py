from threading import Event, Thread

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from meshwright.parallel.promote import Promote


def test_every_way_to_a_narrow_float_gives_float64() -> None:
    wide = torch.ones(2, 2, dtype=torch.float64)
    with Promote():
        results = [
            wide.float(),
            wide.half(),
            wide.bfloat16(),
            wide.to(torch.float32),
            wide.to(dtype=torch.bfloat16),
            wide.type(torch.float32),
            torch.softmax(wide, -1, dtype=torch.float32),
            torch.zeros(2),
            torch.arange(3, dtype=torch.float32),
            wide.sum(dtype=torch.float32),
        ]
    assert {each.dtype for each in results} == {torch.float64}


def test_integers_and_what_follows_are_left_alone() -> None:
    with Promote():
        assert torch.ones(2).to(torch.int64).dtype is torch.int64
    assert torch.zeros(1).dtype is torch.float32


_ENDS = torch.tensor([16, 16, 48], dtype=torch.int32)
_FORMS = {
    "rows by matrix": ((48, 16), (3, 16, 32), _ENDS),
    "matrices by columns": ((3, 16, 32), (32, 48), _ENDS),
    "parts of what is summed": ((16, 48), (48, 32), _ENDS),
    "matrix by matrix": ((3, 16, 32), (3, 32, 16), None),
}


@pytest.mark.parametrize("form", _FORMS)
def test_products_of_groups_are_torchs_own_in_float64(form: str) -> None:
    first, second, ends = _FORMS[form]
    values = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in (first, second)]

    def product(leaves: list[Tensor]) -> list[Tensor]:
        made = functional.grouped_mm(leaves[0], leaves[1], offs=ends)
        return [made, *torch.autograd.grad(made.square().sum(), leaves)]

    expected = product([each.clone().requires_grad_() for each in values])
    with Promote():
        found = product([each.double().requires_grad_() for each in values])
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is torch.float64
        torch.testing.assert_close(one, other.double(), rtol=1e-4, atol=1e-4)


def test_rows_behind_the_last_group_are_zeros_and_have_no_gradient() -> None:
    rows = torch.ones(5, 2, dtype=torch.float64, requires_grad=True)
    with Promote():
        made = functional.grouped_mm(rows, torch.ones(2, 2, 3, dtype=torch.float64), offs=torch.tensor([1, 4]))
    made.sum().backward()
    assert made[:, 0].tolist() == [2.0, 2.0, 2.0, 2.0, 0.0]
    assert rows.grad is not None
    assert rows.grad[:, 0].tolist() == [3.0, 3.0, 3.0, 3.0, 0.0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_backward_runs_again_is_promoted_too(reentrant: bool) -> None:
    values = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def narrow(given: Tensor) -> Tensor:
        return (given.float() * given.float()).exp()

    with Promote():
        checkpoint(narrow, values, use_reentrant=reentrant).sum().backward()
        if not reentrant:
            (again,) = torch.autograd.grad(checkpoint(narrow, values, use_reentrant=False).sum(), values)
            assert torch.equal(again, values.grad)
    wide = values.detach()
    torch.testing.assert_close(values.grad, 2 * wide * (wide * wide).exp(), rtol=1e-14, atol=0)


def test_threads_that_promote_by_turns_leave_backward_as_it_was() -> None:
    before, first, second = torch.autograd._engine_run_backward, Event(), Event()

    def hold() -> None:
        with Promote():
            first.set()
            second.wait(10)

    thread = Thread(target=hold)
    thread.start()
    first.wait(10)
    with Promote():
        second.set()
        thread.join()
        assert torch.autograd._engine_run_backward != before
    assert torch.autograd._engine_run_backward == before
    torch.set_default_dtype(torch.float32)  # the threads' own ends came in another order
