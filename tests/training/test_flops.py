"""FLOPs of products with known counts."""

import pytest
import torch

from moss_train.training.cost.flops import FlopCounter, attention


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
    """Return a tensor without values: the kernels need a GPU, but counting their operators does not."""
    return torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)


@pytest.mark.parametrize(("is_causal", "pairs"), [(False, 100), (True, 55)])
def test_attention_with_shared_keys_costs_what_every_query_sees(is_causal, pairs):
    query, key = half(2, 4, 10, 16), half(2, 2, 10, 16)
    given = {"query": query, "key": key, "value": key, "is_causal": is_causal}
    assert attention(given) == 2 * (2 * 2 * 4 * pairs * 16)
    assert attention({**given, "is_causal": False, "attn_mask": half(10, 10)}) == 2 * (2 * 2 * 4 * 55 * 16)


def test_the_backward_pass_of_attention_costs_twice_the_forward():
    query = torch.ones(1, 2, 10, 16, requires_grad=True)
    with FlopCounter() as counter:
        attended = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        forward = counter.total
        attended.sum().backward()
    assert (forward, counter.total) == (2 * (2 * 2 * 55 * 16), 3 * 2 * (2 * 2 * 55 * 16))


@pytest.mark.parametrize(("window", "pairs"), [(5, 65), (40, 120)])
def test_windowed_attention_costs_the_window(window, pairs):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    query, starts = half(30, 4, 16), torch.zeros(3, dtype=torch.int32, device="meta")  # two clips of 15 frames
    with FlopCounter() as counter:
        attended = varlen.varlen_attn(query, query, query, starts, starts, 15, 15, window_size=(window - 1, 0))
        forward = counter.total
        attended.sum().backward()
    assert (forward, counter.total) == (2 * (2 * 2 * 4 * pairs * 16), 3 * 2 * (2 * 2 * 4 * pairs * 16))
