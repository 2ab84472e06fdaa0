"""Apply the rule of every operation of a recorded forward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fusion.alignment.labels import Labels, along, distinct, made, numbered
from fusion.alignment.ledger import Ledger
from fusion.alignment.nested import flat, nested
from fusion.alignment.rules import RULES, Operation
from fusion.alignment.rules.elementwise import ALIKE
from fusion.alignment.tracing import Call, Trace
from fusion.errors import UserError

_LOST = (
    "the forward pass cannot be followed: an operation reads a tensor that no recorded operation "
    "made; pass a permutation spec written by hand"
)
MANY = 1_000_000  # elements of a constant from which on its values are not compared


class Labeller:
    """Fill a ledger, which several recordings of one network may share."""

    def __init__(self, model: nn.Module) -> None:
        self.ledger = Ledger()
        self.state: dict[str, Labels] = {}  # of each parameter and buffer that was read
        self.first_name: dict[str, str] = {}  # state-dict key -> the first key of the same tensor
        names: dict[int, str] = {}
        for key, tensor in model.state_dict(keep_vars=True).items():
            self.first_name[key] = names.setdefault(id(tensor), key)

    def walk(self, trace: Trace) -> None:
        """Apply the rule of every operation of ``trace``."""
        groups, views = _groups(trace), _views(trace)
        key_of = {id(tensor): key for key, tensor in trace.state.items()}
        read = {id(output) for output in trace.outputs}
        calls = [call for call in reversed(trace.calls) if _leads_to(call, read)][::-1]
        literals = {
            id(part)
            for call in calls
            if call.name.startswith("lift")
            for part in flat(dict(call.arguments))
        }
        known = {id(x): distinct(x.shape, "input") for x in trace.inputs}

        def labels_of(tensor: Tensor) -> Labels:
            if id(tensor) not in known:
                key = key_of.get(id(tensor))
                if key is not None:
                    labels = self._parameter(key, tensor, groups.get(key, 1), views.get(key))
                else:
                    constant = trace.constants.get(id(tensor), tensor)
                    if constant.is_meta and id(tensor) not in literals:
                        raise UserError(_LOST)
                    labels = _constant(constant)
                known[id(tensor)] = labels
            return known[id(tensor)]

        for call in calls:
            results = [part for part in flat(call.result) if isinstance(part, Tensor)]
            if all(not result.is_meta for result in results):
                continue  # a constant, of which the values are known
            arguments = {
                name: _on_cpu(value) if _is_index(call, name) else nested(value, labels_of)
                for name, value in call.arguments.items()
            }
            first = next(
                (t for t in flat(dict(call.arguments)) if isinstance(t, Tensor)), results[0]
            )
            op = Operation(
                name=call.name,
                run=call.run,
                arguments=arguments,
                shapes=tuple(result.shape for result in results),
                used=tuple(id(result) in read for result in results),
                strides=(first.stride(), int(first.storage_offset())),
                why=call.why,
                ledger=self.ledger,
            )
            for result, labels in zip(results, self._apply(op), strict=True):
                assert labels.shape == result.shape, (call.name, labels.shape, result.shape)
                known[id(result)] = labels
        for output in trace.outputs:
            self._fix(labels_of(output), "output")

    def reached(self) -> set[str]:
        """Return the keys of the state dict that some operation has read."""
        return {key for key, first in self.first_name.items() if first in self.state}

    def _apply(self, op: Operation) -> tuple[Labels, ...]:
        rule = None if _is_empty(op) else RULES.get(op.name)
        if op.labels() or op.name in ALIKE:
            found = None if rule is None else rule(op)
        else:  # `arange` and the like
            found = distinct(op.shape, op.why)
        if found is None:
            for labels in op.labels():
                self._fix(labels, op.why)
            return tuple(distinct(shape, op.why) for shape in op.shapes)
        return (found,) if isinstance(found, Labels) else found

    def _fix(self, labels: Labels, why: str) -> None:
        for factor in labels.factors:
            self.ledger.fix(factor, why)

    def _parameter(
        self, key: str, tensor: Tensor, groups: int, view: tuple[int, ...] | None
    ) -> Labels:
        """Return labels of a parameter, or buffer: new atoms along each of its axes."""
        if key not in self.state:
            factors: list[Tensor] = []
            shape = view or tuple(tensor.shape)
            for axis, size in enumerate(shape if tensor.numel() else ()):
                if axis == 1 and groups > 1:
                    factors.append(self._columns_of_groups(key, shape, groups, factors[0]))
                elif size > 1:
                    atoms = self.ledger.column(key, axis, size, view=view)
                    factors.append(along(atoms, axis, len(shape)))
            self.state[key] = Labels(torch.Size(shape), tuple(factors)).viewed(tensor.shape)
        return self.state[key]

    def _columns_of_groups(
        self, key: str, shape: tuple[int, ...], groups: int, rows: Tensor
    ) -> Tensor:
        """Return new atoms for axis 1 of a weight, others for each group of its rows."""
        n = shape[0] // groups
        atoms = torch.stack([
            self.ledger.column(key, 1, shape[1], rows=(j * n, (j + 1) * n)) for j in range(groups)
        ])  # fmt: skip
        self.ledger.partition(atoms, rows.view(groups, -1))
        ones = [1] * (len(shape) - 2)
        return atoms.repeat_interleave(n, dim=0).view(shape[0], shape[1], *ones)


def _leads_to(call: Call, read: set[int]) -> bool:
    """Whether a result of a call is ``read`` later on; then so are its arguments."""
    if read.isdisjoint(map(id, flat(call.result))):
        return False
    read.update(map(id, flat(dict(call.arguments))))
    return True


def _is_empty(op: Operation) -> bool:
    """Whether an argument or result has no elements, as it may on another input."""
    if op.name in ALIKE:
        return False
    made = [shape for shape, used in zip(op.shapes, op.used, strict=True) if used]
    taken = [x.shape for x in op.labels() if op.name != "cat" or x.shape != (0,)]
    return any(not shape.numel() for shape in (*made, *taken))


def _constant(tensor: Tensor) -> Labels:
    """Return labels of a tensor that no permutation reaches: equal values are alike."""
    if tensor.is_meta or tensor.numel() > MANY:
        return distinct(tensor.shape, "a constant")
    return made(tensor.shape, (), [numbered([tensor.detach().cpu()])], "a constant")


def _is_index(call: Call, name: str) -> bool:
    """Whether an argument selects elements by values that are known."""
    if (call.name, name) not in (("index", "indices"), ("index_select", "index")):
        return False
    parts = [part for part in flat(call.arguments[name]) if isinstance(part, Tensor)]
    return all(not part.is_meta for part in parts)


def _on_cpu(value: Any) -> Any:
    return nested(value, Tensor.cpu)


def _groups(trace: Trace) -> dict[str, int]:
    """Return the groups of the convolutions that use parameters, reshaped or not."""
    origin = {id(tensor): key for key, tensor in trace.state.items()}
    found: dict[str, set[int]] = defaultdict(set)
    for call in trace.calls:
        if call.name == "convolution":
            weight, groups = call.arguments["weight"], call.arguments["groups"]
            key = origin.get(id(weight))
            if key is not None and tuple(weight.shape[:2]) != (groups, 1):
                same = trace.state[key].shape[:2] == weight.shape[:2]
                found[key].add(groups if same else 1)
        for result, source in _same_size(call):
            if id(source) in origin:
                origin.setdefault(id(result), origin[id(source)])
    return {key: groups.pop() for key, groups in found.items() if len(groups) == 1}


def _views(trace: Trace) -> dict[str, tuple[int, ...]]:
    """Return the shapes of kernels that the forward pass mixes from the rows of a matrix.

    Each row of such a parameter is a kernel (conditionally parameterized convolutions, Yang et
    al., 2019, 1904.04971).
    """
    matrix = {id(tensor): key for key, tensor in trace.state.items() if tensor.ndim == 2}
    mixed: dict[int, str] = {}
    found: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for call in trace.calls:
        if call.name == "mm" and id(call.arguments["mat2"]) in matrix and len(call.result) == 1:
            mixed[id(call.result)] = matrix[id(call.arguments["mat2"])]
        if call.name == "convolution":
            weight = call.arguments["weight"]
            if id(weight) in mixed:
                key = mixed[id(weight)]
                found[key].add((trace.state[key].shape[0], *weight.shape))
        for result, source in _same_size(call):
            if id(source) in mixed:
                mixed.setdefault(id(result), mixed[id(source)])
    return {key: shapes.pop() for key, shapes in found.items() if len(shapes) == 1}


def _same_size(call: Call) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the results of a call with the arguments that have as many elements."""
    parts = [part for part in flat(dict(call.arguments)) if isinstance(part, Tensor)]
    for result in flat(call.result):
        for part in parts if isinstance(result, Tensor) else ():
            if part.numel() == result.numel():
                yield result, part
