"""Linear assignment: the permutation of units with the largest total agreement."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def best_assignment(agreement: Tensor) -> Tensor:
    """Return the permutation ``p`` that maximises the sum of ``agreement[i, p[i]]``.

    Args:
        agreement: (n, n); row i is place i of the reference, column j is unit j of the model.

    Returns:
        (n,) int64 on the CPU; the identity wherever that is as good as any.
    """
    n = len(agreement)
    best, choice = agreement.max(dim=1)
    if bool((agreement.diagonal() >= best).all()):
        return torch.arange(n)
    choice = choice.cpu()
    if int(choice.bincount(minlength=n).max()) == 1:  # each row's favourite: none is better
        return choice
    return torch.from_numpy(linear_sum_assignment(agreement.cpu().numpy(), maximize=True)[1])


def best_block_assignment(agreements: list[Tensor]) -> Tensor:
    """Return the best permutation of blocks if the units inside may be permuted freely as well.

    Args:
        agreements: For each kind of unit, (blocks, n, blocks, n): agreement of unit i of the
            reference's block a with unit j of the model's block b.

    Returns:
        (blocks,) int64 on the CPU.
    """
    blocks = agreements[0].shape[0]
    value = torch.zeros(blocks, blocks, dtype=torch.float64)
    for agreement in agreements:
        pairs = agreement.transpose(1, 2).double().cpu()  # (a, b, i, j)
        if pairs.shape[-1] == 1:
            value += pairs[..., 0, 0]
            continue
        table = pairs.numpy()
        for a in range(blocks):
            for b in range(blocks):
                inner = table[a, b]
                value[a, b] += inner[linear_sum_assignment(inner, maximize=True)].sum()
    return best_assignment(value)
