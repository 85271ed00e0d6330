"""Counted operations are those of the textbook, by hand and by torch's own counter."""

import pytest
import torch
from torch.linalg import solve_triangular
from torch.utils.flop_counter import FlopCounterMode

from workbench.flops import count_flops
from workbench.objectives import paired_contrastive

draw = torch.Generator().manual_seed(0)


def table(*shape):
    return torch.randn(*shape, generator=draw)


def definite(*shape):
    """Symmetric positive definite."""
    root = table(*shape)
    return root @ root.mT + torch.eye(shape[-1])


def test_a_product_of_m_k_and_n_is_twice_their_product():
    one, two = table(3, 5), table(5, 7)
    result, flops = count_flops(lambda: one @ two)
    assert flops == 2 * 3 * 5 * 7
    torch.testing.assert_close(result, one @ two)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (lambda: torch.addmm(table(7), table(3, 5), table(5, 7)), 2 * 3 * 5 * 7),  # the sum is not counted
        (lambda: torch.bmm(table(4, 3, 5), table(4, 5, 7)), 4 * 2 * 3 * 5 * 7),
        (lambda: torch.nn.functional.linear(table(3, 5), table(7, 5), table(7)), 2 * 3 * 5 * 7),
        (lambda: table(9, 9).exp().sum(), 0),
    ],
)
def test_products_are_counted_as_torch_counts_them(action, expected):
    with FlopCounterMode(display=False) as counter:
        action()
    assert count_flops(action)[1] == counter.get_total_flops() == expected


def test_a_gradient_costs_one_product_for_each_factor_that_has_one():
    weight = table(5, 7).requires_grad_()
    given = table(3, 5)
    _, flops = count_flops(lambda: (given @ weight).sum().backward())
    assert flops == 2 * (2 * 3 * 5 * 7)  # forward, and the weight's; nothing for what is given
    weight, given = table(5, 7).requires_grad_(), table(3, 5).requires_grad_()
    _, flops = count_flops(lambda: (given @ weight).sum().backward())
    assert flops == 3 * (2 * 3 * 5 * 7)


def test_a_training_step_of_a_connector_is_4_dt_di_and_4_b_di_per_sample():
    # No gradient with respect to texts or images: 2 X Z forward and 2 X Z for the weight; the logits 2 B Z,
    # their gradient to the mapped side 2 B Z. hyper-align.md, section 2.4.
    batch, x, z = 16, 6, 10
    weight = table(z, x).requires_grad_()
    texts, images = table(batch, x), table(batch, z)

    def step():
        mapped = torch.nn.functional.normalize(torch.nn.functional.linear(texts, weight), dim=1)
        paired_contrastive(mapped, torch.nn.functional.normalize(images, dim=1)).backward()

    assert count_flops(step)[1] == batch * (4 * x * z + 4 * batch * z)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (lambda: torch.linalg.cholesky(definite(6, 6)), 6**3 // 3),
        (lambda: torch.linalg.cholesky(definite(4, 6, 6)), 4 * 6**3 // 3),
        # n^2 k for k right-hand sides, from either side.
        (lambda: solve_triangular(definite(6, 6), table(6, 4), upper=False), 6**2 * 4),
        (lambda: solve_triangular(definite(6, 6), table(4, 6), upper=True, left=False), 6**2 * 4),
        (lambda: solve_triangular(definite(3, 6, 6), table(3, 6, 4), upper=True), 3 * 6**2 * 4),
        (lambda: torch.cholesky_solve(table(6, 4), definite(6, 6)), 2 * 6**2 * 4),  # two of them
        (lambda: torch.cholesky_solve(table(3, 6, 4), definite(3, 6, 6)), 3 * 2 * 6**2 * 4),
        # 2/3 n^3 for the factors, 2 n^2 k for two triangular solutions.
        (lambda: torch.linalg.solve(definite(6, 6), table(6, 4)), 2 * 6**3 // 3 + 2 * 6**2 * 4),
        (lambda: torch.linalg.solve(definite(6, 6), table(6)), 2 * 6**3 // 3 + 2 * 6**2),
        (lambda: torch.linalg.eigh(definite(6, 6)), 9 * 6**3),
        # 6 m n^2 + 20 n^3, n the smaller side.
        (lambda: torch.linalg.svd(table(9, 5), full_matrices=False), 6 * 9 * 5**2 + 20 * 5**3),
        (lambda: torch.linalg.svd(table(5, 9), full_matrices=False), 6 * 9 * 5**2 + 20 * 5**3),
        (lambda: torch.linalg.svd(table(2, 5, 9), full_matrices=False), 2 * (6 * 9 * 5**2 + 20 * 5**3)),
    ],
)  # fmt: skip
def test_factorisations_cost_what_golub_and_van_loan_say(action, expected):
    products = 0
    with FlopCounterMode(display=False) as counter:  # does not know factorisations: what making inputs costs
        action()
        products = counter.get_total_flops()
    assert count_flops(action)[1] - products == expected


def test_counting_changes_no_result_and_no_random_number():
    torch.manual_seed(3)
    expected = torch.randn(4, 4) @ torch.randn(4, 4)
    torch.manual_seed(3)
    found, _ = count_flops(lambda: torch.randn(4, 4) @ torch.randn(4, 4))
    assert torch.equal(found, expected)


def test_an_error_in_what_is_counted_is_raised_and_counting_ends():
    def fails():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        count_flops(fails)
    assert count_flops(lambda: table(2, 2) @ table(2, 2))[1] == 16
