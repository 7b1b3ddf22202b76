"""FLOPs of products whose number is known."""

import torch

from moss_train.utils.flops import FlopCounter


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
