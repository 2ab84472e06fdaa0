"""Merge the tensors of a network in the common basis of each group of units."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusion.alignment import Entry, Group, PermutationSpec
from fusion.merging.batch_norm import statistics_keys
from fusion.merging.folding import Folding
from fusion.merging.zipping.basis import Basis, merged_variance
from fusion.models import Layer
from fusion.models.layer import is_layer, is_norm
from fusion.weights import tensors_of

Bases = Mapping[str, Basis]
Readers = Mapping[str, Tensor]
Parts = Sequence[tuple[Group, Entry]]


@dataclass(frozen=True)
class Roles:
    """Roles of the axes of a network's tensors.

    Attributes:
        outputs: weight of a convolution or linear layer → the axis of its outputs; all other axes
            are inputs. The only channel axis of a depthwise weight is that of its outputs.
        inner: weights of depthwise convolutions, which scale each unit by itself.
        variances: the running variances of batch norm.
        vectors: biases of layers and parameters of norms.
    """

    outputs: Mapping[str, int]
    inner: frozenset[str]
    variances: frozenset[str]
    vectors: frozenset[str]

    def output_axis(self, key: str, parts: Parts) -> int | None:
        """Return the axis of a tensor that the merge matrix acts on; all others read features."""
        if key in self.outputs:
            return self.outputs[key]
        return min((entry.axis for _, entry in parts), default=None)


def roles_of(model: nn.Module, layers: Sequence[Layer]) -> Roles:
    """Return the roles of the tensors of a network.

    Args:
        model: the network; its values do not matter.
        layers: its layers, including those of functions on plain parameters.
    """
    outputs = {layer.weight: int(layer.kind == "conv_transpose") for layer in layers}
    inner, vectors = set(), set()
    kinds = {layer.weight: layer.kind for layer in layers}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        own = module.state_dict()
        if is_layer(module):
            transposed = bool(getattr(module, "transposed", False))
            for key, tensor in own.items():
                # Under a parametrization (weight norm), the tensor that it starts from.
                if "weight" in key and tensor.shape == module.weight.shape:
                    outputs[prefix + key] = int(transposed)
                    kinds[prefix + key] = "conv_transpose" if transposed else "conv"
                    if getattr(module, "groups", 1) > 1 and tensor.shape[1] == 1:
                        inner.add(prefix + key)
                elif key == "bias":
                    vectors.add(prefix + key)
        elif is_norm(module):
            vectors |= {prefix + key for key in own}
    for layer in layers:
        if layer.groups > 1 and tensors_of(model)[layer.weight].shape[1] == 1:
            inner.add(layer.weight)
    outputs |= {key: 0 for key in inner if tensors_of(model)[key].shape[1] == 1}
    variances = frozenset(variance for _, variance in statistics_keys(model))
    return Roles(outputs, frozenset(inner), variances, frozenset(vectors))


def mixable(spec: PermutationSpec, roles: Roles, group: Group) -> bool:
    """Whether any linear map may be put on a group, not only one that merges whole units.

    That requires units which are computed and read by convolutions and linear layers alone, up to
    norms; a depthwise kernel or a gate treats each unit by itself.
    """
    return not any(
        entry.tensor in roles.inner
        or entry.rows is not None
        or entry.view is not None
        or not (entry.tensor in roles.outputs or entry.tensor in roles.vectors)
        or len(spec.shapes[entry.tensor]) == 0
        for entry in group.entries
    )


def merged_tensor(
    key: str, tensors: Sequence[Tensor], spec: PermutationSpec, bases: Bases, roles: Roles
) -> Tensor:
    r"""Return a tensor in the common basis.

    .. math::
        W = \sum_i M_i^{\mathrm{out}}\, W_i\, U_i^{\mathrm{in}}

    A tensor, or a part of it, without a group of units is the mean.

    Args:
        key: its state-dict key.
        tensors: the networks' tensors, of one shape.
        spec: the groups.
        bases: group → basis.
        roles: of the axes.

    Returns:
        (*shape) float64.
    """
    parts = _units(spec, key, bases)
    if key in roles.variances:
        return _merged_variances(tensors, parts, bases)
    out = roles.output_axis(key, parts)
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for i, tensor in enumerate(tensors):
        maps = []
        for group, entry in parts:
            basis = bases[group.name]
            # The sum is a mean of maps: parts without a group have the same share of each network.
            merge = basis.merge[i] * len(tensors)
            maps.append((group, entry, merge if entry.axis == out else basis.unmerge[i].T))
        total += _mapped(tensor.double(), maps) / len(tensors)
    return total


def merged_folding(
    folding: Folding,
    networks: Sequence[Mapping[str, Tensor]],
    spec: PermutationSpec,
    bases: Bases,
    roles: Roles,
) -> dict[str, Tensor]:
    """Return a layer and its batch norm, merged as the one affine map that they are in evaluation.

    The norm's scale and shift are such that it returns the merged map under the statistics that its
    input would have if features were merged without loss. Measured again, the statistics bring each
    channel to that mean and deviation (as REPAIR does, arXiv 2211.08403).

    Args:
        folding: the layer and its norm.
        networks: the networks' tensors, not folded.
        spec, bases, roles: see :func:`merged_tensor`.
    """
    norm, weight = folding.norm, folding.layer.weight
    maps, biases, means, variances = [], [], [], []
    for tensors in networks:
        folded = {key: t.double() for key, t in folding.folded(tensors).items()}
        variance = tensors[f"{norm}.running_var"].double()
        scale = tensors[f"{norm}.weight"].double() / (variance + folding.eps).sqrt()
        mean = tensors[f"{norm}.running_mean"].double()
        if folding.has_bias:
            mean = mean - tensors[f"{folding.layer.name}.bias"].double()
        maps.append(folded[weight])
        biases.append(folded[f"{norm}.bias"])
        means.append(scale * mean)
        variances.append(scale.square() * variance)

    def merged(key: str, values: Sequence[Tensor]) -> Tensor:
        return merged_tensor(key, values, spec, bases, roles)

    return {
        weight: merged(weight, maps),
        **folding.normalised(
            merged(f"{norm}.bias", biases),
            merged(f"{norm}.running_mean", means),
            merged(f"{norm}.running_var", variances),
        ),
    }


def read_tensor(
    key: str, tensor: Tensor, spec: PermutationSpec, readers: Readers, roles: Roles
) -> Tensor:
    """Return one network's tensor, such as its head's, reading merged features.

    Args:
        key: its state-dict key.
        tensor: the tensor.
        spec: the groups.
        readers: group → the network's unmerge matrix.
        roles: of the axes.
    """
    out = roles.outputs.get(key)
    inputs = [(group, entry) for group, entry in _units(spec, key, readers) if entry.axis != out]
    if not inputs or not tensor.is_floating_point():
        return tensor
    maps = {name: matrix.T for name, matrix in readers.items()}
    return _mapped(tensor.double(), [(g, e, maps[g.name]) for g, e in inputs]).to(tensor.dtype)


def unmerge_matrix(
    key: str, spec: PermutationSpec, readers: Readers, roles: Roles, channels: int
) -> Tensor:
    """Return the map from merged channels to a network's own, (channels, channels) float64.

    Args:
        key: weight of the layer or norm whose output the channels are.
        spec, readers, roles: see :func:`read_tensor`.
        channels: number of channels.
    """
    matrix = torch.eye(channels, dtype=torch.float64)
    axis = roles.outputs.get(key, 0)
    for group, entry in _units(spec, key, readers):
        if entry.axis == axis:
            _place(matrix, entry.positions, readers[group.name])
    return matrix


def _units(spec: PermutationSpec, key: str, known: Collection[str]) -> Parts:
    found = spec.by_tensor.get(key, ())
    return [(group, entry) for group, entry in found if group.name in known]


def _mapped(tensor: Tensor, maps: Sequence[tuple[Group, Entry, Tensor]]) -> Tensor:
    """Return a tensor with a map of units, (size, size) each, applied wherever they occur."""
    shape = tensor.shape
    view = next((entry.view for _, entry, _ in maps if entry.view is not None), None)
    value = tensor.reshape(view or shape)
    for axis in sorted({entry.axis for _, entry, _ in maps}):
        here = [(entry, part) for _, entry, part in maps if entry.axis == axis]
        for rows in sorted({entry.rows for entry, _ in here}, key=str):
            matrix = torch.eye(value.shape[axis], dtype=torch.float64)
            for entry, part in here:
                if entry.rows == rows:
                    _place(matrix, entry.positions, part)
            matrix = matrix.to(value.device)
            if rows is None:
                value = _along(matrix, value, axis)
            else:
                value = value.clone()
                value[slice(*rows)] = _along(matrix, value[slice(*rows)], axis)
    return value.reshape(shape)


def _merged_variances(tensors: Sequence[Tensor], parts: Parts, bases: Bases) -> Tensor:
    stacked = torch.stack([tensor.double() for tensor in tensors])
    merged = stacked.clamp(min=0).sqrt().mean(0).square()  # where units are averaged in place
    for group, entry in parts:
        for place in entry.positions.unbind(1):
            merged[place] = merged_variance(bases[group.name], stacked[:, place])
    return merged


def _place(matrix: Tensor, positions: Tensor, part: Tensor) -> None:
    """Insert a map of units at their positions, (size, copies), into a map of a whole axis."""
    for place in positions.unbind(1):
        matrix[place[:, None], place[None, :]] = part


def _along(matrix: Tensor, value: Tensor, axis: int) -> Tensor:
    """Apply a map to one axis."""
    moved: Tensor = torch.tensordot(matrix, value, dims=([1], [axis]))
    return moved.movedim(0, axis)
