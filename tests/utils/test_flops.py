"""FLOPs of products whose number is known."""

import pytest
import torch

from moss_train.training.cost.flop_counter import FlopCounter


def test_forward_and_backward_of_a_product_are_counted():
    a, b = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7, requires_grad=True)
    with FlopCounter() as counter:
        (a @ b).sum().backward()
    assert counter.total == 3 * (2 * 3 * 5 * 7)  # one product forward, one for each gradient


def test_gradients_taken_by_name_are_counted_and_elementwise_work_is_not():
    a, b = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7)
    with FlopCounter() as counter:
        torch.autograd.grad((torch.tanh(a) @ b).exp().sum(), a)
    assert counter.total == 2 * (2 * 3 * 5 * 7)


def half(*shape: int) -> torch.Tensor:
    """Without values: the kernels need a GPU, their operators do not."""
    return torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_attention_with_shared_keys_costs_what_every_query_sees(kernel):
    query, key = half(2, 4, 10, 16), half(2, 2, 30, 16)
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention")
    assert FlopCounter().formulas[operator](query, key, key) == 2 * (2 * 2 * 4 * 10 * 30 * 16)
    backward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention_backward")
    assert FlopCounter().formulas[backward](query, query, key, key) == 5 * (2 * 2 * 4 * 10 * 30 * 16)


@pytest.mark.parametrize(("window", "seen"), [(5, 5), (40, 15)])
def test_windowed_attention_costs_the_window(window, seen):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    query, starts = half(30, 4, 16), torch.zeros(3, dtype=torch.int32, device="meta")
    with FlopCounter() as counter:
        attended = varlen.varlen_attn(query, query, query, starts, starts, 15, 15, window_size=(window - 1, 0))
    assert counter.total == 2 * (2 * 30 * 4 * seen * 16)
    with FlopCounter() as counter:
        attended.sum().backward()
    assert counter.total == 5 * (2 * 30 * 4 * seen * 16)
