"""Works add up."""

from meshwright.parallel.work import Attention, Product, Sent, Work


def test_an_element_has_the_bytes_of_its_precision() -> None:
    assert Product(2, 3, 4).bytes() == 2 * (8 + 12 + 6)
    assert Product(2, 3, 4, precision="fp32").bytes() == 2 * Product(2, 3, 4).bytes()
    assert Product(2, 3, 4).bytes(1) == 26


def test_one_work_after_another_keeps_both_and_works_in_the_larger_of_both() -> None:
    one = Work(products=(Product(1, 2, 3),), moved_bytes=5.0, operations=2, saved_bytes=7.0, working_bytes=9.0)
    other = Work(attentions=(Attention(4.0, 1.0),), sent=(Sent("tp", "all_reduce", 8),), saved_bytes=1.0)
    both = one + other
    assert both.flops == 12 + 4
    assert (both.moved_bytes, both.operations, both.saved_bytes, both.working_bytes) == (5.0, 2, 8.0, 9.0)
    assert both.sent == other.sent
    assert one + Work() == one
