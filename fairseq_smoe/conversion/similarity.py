"""How alike experts are: by their outputs on the same tokens, or by their weights.

Letters in names: E experts, N tokens, D width of an output.
"""

import numpy as np
import torch

_CONSTANT = 1e-12  # a variance this small beside the largest is noise of rounding


class LinearCKA:
    """Linear centred kernel alignment of E sets of outputs for the same tokens, which come in any
    number of batches.

    Of two sets X and Y (N, D), each centred over the tokens, it is |X^T Y|^2 / (|X^T X| |Y^T Y|)
    with Frobenius norms (Kornblith et al. 2019, arXiv 1905.00414, eq. 2 and 4): 1 if the outputs
    differ by a rotation and a factor, 0 if those of one set tell nothing about those of the other.

    What is kept are sums of products (D, D) in float64 of each pair of sets, whatever the number
    of tokens.

    Args:
        number: E.
        width: D.
        device: of the outputs.
    """

    def __init__(self, number, width, device="cpu"):
        exact = {"dtype": torch.float64, "device": device}
        # row i has the products of set i with the sets from i on
        self._products = [torch.zeros(width, (number - i) * width, **exact) for i in range(number)]
        self._sums = torch.zeros(number * width, **exact)
        self._origin = None
        self._width, self._num_tokens = width, 0

    @staticmethod
    def num_bytes(number, width):
        """Memory of what is kept."""
        return number * (number + 1) // 2 * width * width * 8

    @torch.no_grad()
    def add(self, outputs):
        """Add a batch: a list of E tensors (N, D)."""
        rows = torch.cat(outputs, dim=1)
        if not len(rows):
            return
        if self._origin is None:
            # near the mean, so that little is lost when it is subtracted from the sums
            self._origin = rows.mean(dim=0)
        rows = rows - self._origin
        for i, products in enumerate(self._products):
            start = i * self._width
            products += rows[:, start : start + self._width].t() @ rows[:, start:]
        self._sums += rows.sum(dim=0)
        self._num_tokens += len(rows)

    def matrix(self):
        """(E, E) in numpy. Sets that are constant over the tokens are alike, and unlike others."""
        number, width = len(self._products), self._width
        squares_EE = np.zeros((number, number))
        for i, products in enumerate(self._products):
            sums = self._sums[i * width :]
            centred = products - torch.outer(sums[:width], sums) / max(self._num_tokens, 1)
            squares = centred.view(width, number - i, width).square().sum(dim=(0, 2))
            squares_EE[i, i:] = squares_EE[i:, i] = squares.cpu().numpy()
        size_E = np.sqrt(squares_EE.diagonal())
        varies_E = size_E > _CONSTANT * size_E.max(initial=0)
        both_EE = np.logical_and.outer(varies_E, varies_E)
        alike_EE = np.equal.outer(varies_E, varies_E).astype(float)
        return np.divide(squares_EE, np.outer(size_E, size_E), out=alike_EE, where=both_EE)


def weight_similarity(tensors, surrogate=False):
    """Minus the mean squared difference of the weights of each pair of experts.

    Args:
        tensors: stacked parameters of two layers, ``W1 (E, D, F), b1 (E, F), W2 (E, F, D), b2
            (E, D)``; biases may be None.
        surrogate: compare the products of the weights of both layers, (D, D), instead, which do not
            depend on the order of the hidden units.

    Returns:
        (E, E) in numpy, float64.
    """
    w1, _, w2, _ = tensors
    number = len(w1)

    def of_expert(e):
        if surrogate:
            return [w1[e].float() @ w2[e].float()]
        return [tensor[e].float() for tensor in tensors if tensor is not None]

    similarity_EE = np.zeros((number, number))
    for i in range(number):
        one = of_expert(i)
        for j in range(i + 1, number):
            other = of_expert(j)
            squares = sum(
                (a - b).square().sum(dtype=torch.float64).item() for a, b in zip(one, other)
            )
            similarity_EE[i, j] = similarity_EE[j, i] = -squares / sum(a.numel() for a in one)
    return similarity_EE
