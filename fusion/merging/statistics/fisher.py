"""The diagonal of the Fisher information: squared gradients of single examples."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from fusion.data import seed_from
from fusion.errors import UserError, first_line
from fusion.models import Layer
from fusion.models.layer import is_leaf

log = logging.getLogger(__name__)

# Up to so many classes the expectation over the model's labels is exact, at one backward pass for
# each class; with more, a label is drawn for each example.
EXACT_CLASSES = 10
# Memory limit for gradients, their squares and the layers' outputs of a few examples.
_BYTES = 1 << 29
# With fewer examples at a time, vmap takes longer than one graph after another.
_FEW_EXAMPLES = 4


class FisherDiagonal:
    r"""The mean of squared per-example gradients, for parameters of some layers of one network.

    .. math::

        F = \frac{1}{N} \sum_x \operatorname{E}_{y}
        \bigl(\nabla_\theta \log p(y \mid x; \theta)\bigr)^{\odot 2}

    Source: Matena and Raffel, 2022 (arXiv 2111.09832), section 3. Batch norm uses its running
    statistics, so that an example's gradient does not depend on the others.

    Args:
        network: the network, in evaluation mode; it returns logits (N, classes).
        layers: the layers whose floating-point parameters are used.
        labels: ``model``: y is the network's own prediction, the exact expectation for up to
            ``EXACT_CLASSES`` classes, else one seeded draw for each example; ``true``: y is the
            label.
        seed: of the draws, which do not depend on the size of a batch.
        limit: bytes that the gradients of a few examples may take.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[Layer],
        *,
        labels: str = "model",
        seed: int = 0,
        limit: int = _BYTES,
    ) -> None:
        self._network = network
        self._labels = labels
        self._limit = limit
        self._names, self._parameters = _parameters_of(network, layers)
        state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        self._others = {k: t.detach() for k, t in state.items() if k not in self._parameters}
        self._sums = {
            key: torch.zeros_like(
                tensor, dtype=torch.float64, memory_format=torch.contiguous_format
            )
            for key, tensor in self._parameters.items()
        }
        self._count = 0
        self._generator = torch.Generator().manual_seed(seed_from(seed, "fisher"))
        self._chunk = 0
        self._vectorised = True

    def add(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Add the squared gradients of a batch.

        Args:
            images: (N, …).
            labels: (N,) numbers of outputs; only read if the true labels are used.

        Raises:
            UserError: the network does not return logits, or a label has no output.
        """
        if not self._parameters:
            return
        logits = self._logits(images)
        directions, importance = self._targets(logits, labels)
        chunk = min(self._chunk, len(images)) if self._vectorised else len(images)
        pieces = (torch.split(x, chunk) for x in (images, directions, importance))
        for some, towards, weights in zip(*pieces, strict=True):
            for key, squares in self._squares(some, towards, weights).items():
                self._sums[key] += squares
        self._count += len(images)

    def finished(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (state-dict key, Fisher diagonal (*shape) in float64); tied names have one each.

        Parameters that the network does not use have zeros.
        """
        for key, names in self._names.items():
            mean = self._sums.pop(key) / self._count
            for name in names:
                yield name, mean

    @torch.no_grad()
    def _logits(self, images: Tensor) -> Tensor:
        """Run the network; the first time, determine how many examples are differentiated together.

        An example takes its gradients and their squares, and the outputs of the layers.
        """
        values = 0

        def count(_: nn.Module, __: object, output: object) -> None:
            nonlocal values
            values += output.numel() if isinstance(output, Tensor) else 0

        handles = []
        if not self._chunk:
            leaves = [module for module in self._network.modules() if is_leaf(module)]
            handles = [module.register_forward_hook(count) for module in leaves]
        try:
            logits = self._network(images)
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(logits, Tensor) or logits.shape[:-1] != images.shape[:1]:
            what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(
                f"the Fisher information takes a network that returns logits (N, classes), and "
                f"{type(self._network).__name__} returns {what} for {len(images)} images; use a "
                f"rule that needs no gradients"
            )
        if not self._chunk:
            size = sum(p.numel() for p in self._parameters.values())
            width = max(t.element_size() for t in self._parameters.values())
            each = width * (3 * size + 2 * values // len(images))
            self._chunk = max(1, self._limit // each)
            self._vectorised = self._chunk >= _FEW_EXAMPLES
        return logits

    def _targets(self, logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities to differentiate, (N, m, classes), and their weights."""
        count, classes = logits.shape
        if self._labels == "true":
            if labels is None or int(labels.min()) < 0 or int(labels.max()) >= classes:
                raise UserError(
                    f"labels: the network has {classes} outputs, and the images have "
                    f"{'no labels' if labels is None else f'labels up to {int(labels.max())}'}; "
                    f"say which classes the outputs stand for, or take labels from the model"
                )
        elif classes <= EXACT_CLASSES:
            directions = torch.eye(classes, dtype=logits.dtype, device=logits.device)
            return directions.expand(count, -1, -1), logits.softmax(-1)
        else:
            # One number for each example, in its order: batches do not matter.
            draws = torch.rand(count, 1, dtype=torch.float64, generator=self._generator)
            below = logits.double().softmax(-1).cumsum(-1) < draws.to(logits.device)
            labels = below.sum(-1).clamp(max=classes - 1)
        chosen = nn.functional.one_hot(labels.to(logits.device), classes).to(logits.dtype)
        return chosen[:, None], logits.new_ones(count, 1)

    def _squares(self, images: Tensor, directions: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return the sums of squared gradients of a few examples."""
        if self._vectorised:
            try:
                each = vmap(self._of_one, in_dims=(None, 0, 0, 0))
                found = each(self._parameters, images, directions, weights)
                return {key: squares.sum(0) for key, squares in found.items()}
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                # Exceptions of torch.func for operations that it cannot batch. Any other error is
                # raised again below.
                log.info(
                    "%s: gradients are computed example by example, because torch.func.vmap "
                    "cannot batch it (%s)",
                    type(self._network).__name__,
                    first_line(error),
                )
                self._vectorised = False
        return self._one_after_another(images, directions, weights)

    def _of_one(
        self, parameters: dict[str, Tensor], image: Tensor, directions: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """Return Σ weight · gradient² of one example's log-probabilities, as torch.func sees it."""

        def log_probabilities(parameters: dict[str, Tensor]) -> Tensor:
            logits = functional_call(self._network, {**self._others, **parameters}, (image[None],))
            return logits[0].log_softmax(-1)  # type: ignore[no-any-return]

        pull: Any = vjp(log_probabilities, parameters)[1]
        total: dict[str, Tensor] = {}
        for direction, weight in zip(directions.unbind(), weights.unbind(), strict=True):
            for key, gradient in pull(direction)[0].items():
                squares = weight * gradient.square()
                total[key] = total[key] + squares if key in total else squares
        return total

    def _one_after_another(
        self, images: Tensor, directions: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """Return the same, summed over examples, through a graph for each of them."""
        leaves = {key: t.detach().requires_grad_() for key, t in self._parameters.items()}
        total = {key: torch.zeros_like(tensor) for key, tensor in self._parameters.items()}
        for image, towards, shares in zip(images, directions, weights, strict=True):
            with torch.enable_grad():
                logits = functional_call(self._network, {**self._others, **leaves}, (image[None],))
                chosen = towards @ logits[0].log_softmax(-1)
            for value, share in zip(chosen, shares, strict=True):
                gradients = torch.autograd.grad(
                    value, list(leaves.values()), retain_graph=True, allow_unused=True
                )
                for key, gradient in zip(leaves, gradients, strict=True):
                    if gradient is not None:
                        total[key].addcmul_(share * gradient, gradient)
        return total


def _parameters_of(
    network: nn.Module, layers: Sequence[Layer]
) -> tuple[dict[str, list[str]], dict[str, Tensor]]:
    """Return the names of each parameter of the layers, by its first, and the parameters."""
    wanted = {key for layer in layers for key in layer.tensors}
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for key, parameter in network.named_parameters(remove_duplicate=False):
        if key in wanted and parameter.is_floating_point():
            names.setdefault(id(parameter), []).append(key)
            tensors[id(parameter)] = parameter.detach()
    firsts = {same[0]: number for number, same in names.items()}
    return {first: names[n] for first, n in firsts.items()}, {
        f: tensors[n] for f, n in firsts.items()
    }
