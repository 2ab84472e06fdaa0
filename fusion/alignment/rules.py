"""What each operation of a network does to the labels of its channels.

Five kinds cover the convolutional networks we know: operations that only move data run on the
labels themselves; elementwise ones tie the units that meet; spatial ones (pooling) and
normalisations keep the units; contractions (convolution, linear) take units along one axis of their
weight and make new ones along the other. Any operation that is not listed fixes every unit it
touches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusion.alignment.labels import (
    FIXED,
    Blocks,
    Labels,
    Ledger,
    Vector,
    channelwise,
    compact,
    constant,
    core,
    grid,
    join,
    merge_sites,
)
from fusion.alignment.nested import argument, flat, nested


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer as the graph hands it around; ``key`` is its state-dict key."""

    key: str
    shape: torch.Size


class Rules:
    """What operations demand of the units of one network, filled in call by call."""

    def __init__(self, model: nn.Module) -> None:
        self.ledger = Ledger()
        self.elementwise_parameters: dict[str, Labels] = {}  # scales, shifts, masks
        self.refused: dict[str, str] = {}  # parameters of unknown operations
        self.made: dict[tuple[str, int], Vector] = {}  # the units that a weight makes
        self.groups: dict[str, int] = {}  # of the convolution that a weight belongs to
        self.first_name: dict[str, str] = {}  # state-dict key -> the first key of the same tensor
        names: dict[int, str] = {}
        for key, tensor in model.state_dict(keep_vars=True).items():
            self.first_name[key] = names.setdefault(id(tensor), key)

    # -- rules ------------------------------------------------------------------------------------

    def unknown(self, why: str, real: Any, inputs: Any) -> Any:
        """Fix whatever goes in; what comes out cannot be permuted either."""
        for value in flat(inputs):
            if isinstance(value, Labels):
                self.ledger.fix(value.units, why)
            elif isinstance(value, Parameter):
                self._refuse(value.key, why)
        return nested(real, lambda part: constant(FIXED, part.shape))

    def move(self, target: Callable[..., Any], args: Any, kwargs: Any, real: Any) -> Any:
        """Move data: run the operation on the labels themselves."""
        units = target(*_pick(args, "units"), **_pick(kwargs, "units"))
        sites = target(*_pick(args, "sites"), **_pick(kwargs, "sites"))
        if isinstance(units, Tensor):
            assert units.shape == real.shape
            return Labels(compact(units), compact(sites))
        return tuple(Labels(compact(u), compact(s)) for u, s in zip(units, sites, strict=True))

    def concatenation(self, name: str, args: Any, kwargs: Any) -> Any:
        """Put activations side by side, as `cat` or `stack` does."""
        parts = argument(args, kwargs, 0, "tensors")
        axis = argument(args, kwargs, 1, "dim", kwargs.get("axis", 0))
        if name == "stack":
            parts = [Labels(p.units.unsqueeze(axis), p.sites.unsqueeze(axis)) for p in parts]
        return join(parts, axis)

    def elementwise(self, values: list[Labels], real: Tensor, why: str) -> Labels:
        """Tie the units that meet when activations are combined element by element."""
        if len(values) == 1 and values[0].shape == real.shape:
            return values[0]
        rank = real.ndim
        units = [_with_rank(core(value.units), rank) for value in values]
        sites = [_with_rank(core(value.sites), rank) for value in values]
        shapes = [[1] * (rank - len(value.shape)) + list(value.shape) for value in values]
        varying = [any(u.shape[axis] > 1 for u in units) for axis in range(rank)]
        keep = []
        for shape, labels in zip(shapes, units, strict=True):
            # Broadcast along channels, one element meets many units: it must not depend on any.
            broadcast = any(
                varying[axis] and shape[axis] == 1 < real.shape[axis] for axis in range(rank)
            )
            if broadcast:
                self.ledger.fix(labels, f"{why}, broadcast over channels")
            else:
                keep.append(labels)
        if not keep:
            return constant(FIXED, real.shape)
        for other in keep[1:]:
            self.ledger.tie(keep[0], other, why)
        simplest = min(keep, key=Tensor.numel)
        if any((labels == FIXED).all() for labels in keep):
            simplest = torch.zeros([1] * rank, dtype=torch.int64)
        merged = sites[0]
        for site in sites[1:]:
            merged = merge_sites(merged, site)
        return Labels(simplest.expand(real.shape), merged.expand(real.shape))

    def per_channel(self, x: Labels, parameters: Iterable[Any], why: str) -> Labels | None:
        """Scale, shift or normalise each channel of axis 1 by itself."""
        axis = 1 if len(x.shape) > 1 else 0
        vector = self.ledger.vector(x, axis, why)
        return self._affine(x, vector.labels, parameters, why)

    def layer_norm(self, x: Labels, axes: int, affine: Iterable[Any], why: str) -> Labels | None:
        """Normalise over the last ``axes`` axes, which may hold the channels."""
        first = len(x.shape) - axes
        varying = [axis for axis, size in enumerate(core(x.units).shape) if size > 1]
        if len(varying) > 1 or any(axis < first for axis in varying):
            return None
        if varying:
            self.ledger.vector(x, varying[0], why)
        for parameter in affine:
            if parameter is not None:
                labels = self.labels_of(parameter).units
                self.ledger.tie(labels, core(x.units).reshape(core(x.units).shape[first:]), why)
        return x

    def group_norm(self, x: Labels, groups: int, affine: Iterable[Any], why: str) -> Labels | None:
        """Normalise over channels and pixels of each of ``groups`` blocks of channels."""
        vector = self.ledger.vector(x, 1, why)
        if 1 < groups < x.shape[1]:
            self.ledger.blocks.append(Blocks(why, (vector.labels.reshape(groups, -1),)))
        return self._affine(x, vector.labels, affine, why)

    def _affine(
        self, x: Labels, channels: Tensor, parameters: Iterable[Any], why: str
    ) -> Labels | None:
        for parameter in parameters:
            if parameter is None:
                continue
            labels = self.labels_of(parameter).units
            if labels.numel() == channels.numel():
                self.ledger.tie(labels.reshape(-1), channels, why)
            elif labels.numel() == 1:
                self.ledger.fix(labels, f"{why}, one value for all channels")
            else:
                return None
        return x

    def spatial(self, x: Labels, real: Tensor, axes: int, why: str) -> Labels | None:
        """Work on each channel by itself, over the ``axes`` last axes."""
        varying = [axis for axis, size in enumerate(core(x.units).shape) if size > 1]
        if len(varying) > 1 or any(axis >= real.ndim - axes for axis in varying):
            return None
        axis = varying[0] if varying else max(real.ndim - axes - 1, 0)
        return channelwise(self.ledger.vector(x, axis, why), real.shape, axis)

    def pad(self, x: Labels, real: Tensor, args: Any, kwargs: Any, why: str) -> Labels | None:
        """Add pixels around each channel, or channels of one constant."""
        widths = list(argument(args, kwargs, 1, "pad"))
        mode = argument(args, kwargs, 2, "mode", "constant")
        axes = max((i // 2 + 1 for i, width in enumerate(widths) if width), default=0)
        if axes < real.ndim - 1:
            return self.spatial(x, real, axes, why)
        if axes != real.ndim - 1 or mode != "constant" or min(widths) < 0:
            return None
        # New channels of one constant: alike, so that each may take the place of another.
        vector = self.ledger.vector(x, 1, why)
        before, after = widths[2 * axes - 2 : 2 * axes]
        labels = [self.ledger.fresh(before), vector.labels, self.ledger.fresh(after)]
        patterns = torch.nn.functional.pad(vector.patterns, (before, after))
        return channelwise(Vector(torch.cat(labels), patterns), real.shape, 1)

    def same_everywhere(self, real: Tensor) -> Labels:
        """Make an activation of one constant, whose channels are alike."""
        if real.ndim < 2:
            return constant(FIXED, real.shape)
        n = real.shape[1]
        vector = Vector(self.ledger.fresh(n), torch.zeros(n, dtype=torch.int64))
        return channelwise(vector, real.shape, 1)

    def reduce(self, x: Labels, real: Tensor, args: Any, kwargs: Any, why: str) -> Labels | None:
        """Sum (or the like) over axes: over pixels the units stay, over channels they vanish."""
        rank = len(x.shape)
        axes = argument(args, kwargs, 1, "dim", kwargs.get("axis"))
        if axes is None or isinstance(axes, bool):  # std(False) is about bias, not an axis
            axes = range(rank)
        reduced = {axis % rank for axis in ([axes] if isinstance(axes, int) else axes)}
        varying = [axis for axis, size in enumerate(core(x.units).shape) if size > 1]
        if len(varying) > 1:
            return None
        if not varying:
            self.ledger.fix(x.units, why)
            return constant(FIXED, real.shape)
        vector = self.ledger.vector(x, varying[0], why)
        if varying[0] in reduced:  # the sum over exchangeable units does not know their order
            return constant(FIXED, real.shape)
        axis = varying[0]
        if real.ndim < rank:
            axis -= sum(other < axis for other in reduced)
        return channelwise(vector, real.shape, axis)

    def share(self, x: Labels, why: str) -> Labels | None:
        """Divide by a sum, over channels or over pixels: neither knows the order of units."""
        varying = [axis for axis, size in enumerate(core(x.units).shape) if size > 1]
        if len(varying) > 1:
            return None
        if varying:
            self.ledger.vector(x, varying[0], why)
        return x

    def functional_contraction(
        self, name: str, args: Any, kwargs: Any, why: str, real: Tensor
    ) -> Labels | None:
        """Convolution or linear layer as a function of a parameter."""
        x, weight = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "weight")
        bias = argument(args, kwargs, 2, "bias")
        if not isinstance(x, Labels) or not isinstance(weight, Parameter):
            return None
        if name == "linear":
            return self.contraction(x, weight, bias, 1, -1, (1, 0), why, real)
        groups = argument(args, kwargs, 6, "groups", 1)
        return self.convolution(x, weight, bias, groups, why, real)

    def convolution(
        self, x: Labels, weight: Parameter, bias: Any, groups: int, why: str, real: Tensor,
        *, transposed: bool = False,
    ) -> Labels | None:  # fmt: skip
        """Convolution of any kind, ``groups`` and transposed ones included."""
        channel_axis = real.ndim - (len(weight.shape) - 2) - 1  # images may come without batch axis
        sides = (0, 1) if transposed else (1, 0)
        return self.contraction(x, weight, bias, groups, channel_axis, sides, why, real)

    def contraction(
        self, x: Labels, weight: Parameter, bias: Any, groups: int, channel_axis: int,
        sides: tuple[int, int], why: str, real: Tensor,
    ) -> Labels | None:  # fmt: skip
        """Sum over the units along axis ``sides[0]`` of the weight, make those of ``sides[1]``."""
        ledger, key = self.ledger, weight.key
        if key in self.elementwise_parameters or key in self.refused:
            self._refuse(key, f"{key} is a weight and acts element by element too")
            return None
        if self.groups.setdefault(key, groups) != groups:
            self._refuse(key, f"{key} belongs to convolutions of different groups")
            return None
        taken = ledger.vector(x, channel_axis, why)
        n_in, n_out = len(taken.labels), real.shape[channel_axis]
        if n_in == groups == n_out:  # depthwise: each unit keeps its own filter
            made = taken
            ledger.use(key, 0, taken, why)
        elif groups == 1:
            made = self._made(key, sides[1], n_out)
            ledger.use(key, sides[0], taken, why)
            ledger.use(key, sides[1], made, why)
        else:
            made = self._made(key, sides[1], n_out)
            whole, split = (taken, made) if sides[0] == 0 else (made, taken)
            ledger.use(key, 0, whole, why)
            rows, columns = weight.shape[0] // groups, weight.shape[1]
            for g in range(groups):
                part = slice(g * columns, (g + 1) * columns)
                segment = Vector(split.labels[part], split.patterns[part])
                ledger.use(key, 1, segment, why, rows=(g * rows, (g + 1) * rows))
            both = (taken.labels.view(groups, -1), made.labels.view(groups, -1))
            ledger.blocks.append(Blocks(why, both))
        if bias is not None:
            ledger.tie(self.labels_of(bias).units, made.labels, why)
        return channelwise(made, real.shape, channel_axis)

    def _made(self, key: str, axis: int, n: int) -> Vector:
        """Return the units that the weight ``key`` makes, the same ones at each of its calls."""
        if (key, axis) not in self.made:
            none = torch.zeros(n, dtype=torch.int64)
            self.made[key, axis] = Vector(self.ledger.fresh(n), none)
        return self.made[key, axis]

    # -- parameters -------------------------------------------------------------------------------

    def attribute(self, target: str, real: Any) -> Any:
        """Return what stands for a tensor that the graph takes from the network."""
        if not isinstance(real, Tensor):
            return real
        if target in self.first_name:
            return Parameter(self.first_name[target], real.shape)
        return constant(FIXED, real.shape)  # not in the state dict: nothing can permute it

    def labels_of(self, value: Labels | Parameter) -> Labels:
        """Return the labels of an activation, or those of a parameter used element by element."""
        if isinstance(value, Labels):
            return value
        key, shape = value.key, value.shape
        if any(use.tensor == key for use in self.ledger.uses.values()):
            self._refuse(key, f"{key} is a weight and acts element by element too")
        if key in self.refused:
            return constant(FIXED, shape)
        if key not in self.elementwise_parameters:
            long = [axis for axis, size in enumerate(shape) if size > 1]
            units = self.ledger.fresh(shape.numel()).view(shape)
            # The first axis of more than one element is taken for the units', the rest for sites.
            self.elementwise_parameters[key] = Labels(units, grid(shape, long[0] if long else None))
        return self.elementwise_parameters[key]

    def materialised(self, values: Any) -> Any:
        """Return ``values`` with labels in place of parameters."""
        return nested(values, self.labels_of, of=Parameter)

    def _refuse(self, key: str, why: str) -> None:
        """Fix every unit along any axis of the parameter ``key``, now and from now on."""
        self.refused.setdefault(key, why)
        for use in self.ledger.uses.values():
            if use.tensor == key:
                self.ledger.fix(use.labels, why)
        if key in self.elementwise_parameters:
            self.ledger.fix(self.elementwise_parameters[key].units, why)


def _pick(values: Any, part: str) -> Any:
    return nested(values, lambda labels: getattr(labels, part), of=Labels)


def _with_rank(labels: Tensor, rank: int) -> Tensor:
    return labels.reshape([1] * (rank - labels.ndim) + list(labels.shape))
