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
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

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
from fusion.alignment.operations import (
    CASTS,
    CHANNEL_NORMS,
    CONSTANTS,
    CONTRACTIONS,
    CONVOLUTIONS,
    ELEMENTWISE,
    ELEMENTWISE_MODULES,
    JOINS,
    LIBRARIES,
    MOVE_MODULES,
    MOVES,
    REDUCTIONS,
    RESHAPES,
    RESIZE_MODULES,
    RESIZES,
    SHARE_MODULES,
    SHARES,
    SPATIAL,
    SPATIAL_MODULES,
    TRANSPOSED,
)
from fusion.alignment.tracing import Graph


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer as the graph hands it around; ``key`` is its state-dict key."""

    key: str
    shape: torch.Size


class Labeller:
    """Walks a graph and fills a ledger; several graphs of one network may share it."""

    def __init__(self, model: nn.Module) -> None:
        self.ledger = Ledger()
        self.elementwise: dict[str, Labels] = {}  # parameters that act element by element
        self.refused: dict[str, str] = {}  # parameters of unknown operations
        self.made: dict[tuple[str, int], Vector] = {}  # the units that a weight makes
        self.first_name: dict[str, str] = {}  # state-dict key -> the first key of the same tensor
        names: dict[int, str] = {}
        for key, tensor in model.state_dict(keep_vars=True).items():
            self.first_name[key] = names.setdefault(id(tensor), key)

    def walk(self, graph: Graph) -> None:
        """Apply the rule of every node of ``graph``."""
        module = graph.module
        env: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            real = graph.value[node]
            args = map_arg(node.args, env.__getitem__)
            kwargs = map_arg(node.kwargs, env.__getitem__)
            if node.op == "output":
                self._unknown("output", None, args)
            elif node.op == "get_attr":
                env[node] = self._attribute(str(node.target), real)
            elif not any(isinstance(part, Tensor) for part in _flat(real)):
                env[node] = real  # sizes and other plain numbers
            elif node.op == "placeholder":
                env[node] = constant(FIXED, real.shape)
            else:
                env[node] = self._call(module, node, real, args, kwargs)
                for value in _flat(env[node]):
                    if isinstance(value, Labels):
                        self.ledger.see(value)

    # -- dispatch ---------------------------------------------------------------------------------

    def _call(self, root: nn.Module, node: fx.Node, real: Any, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            why = f"{node.target} ({type(module).__name__})"
            done = self._call_module(module, str(node.target), why, real, args, kwargs)
        else:
            name = node.target if isinstance(node.target, str) else _name(node.target)
            why = f"{node.name} ({name})"
            done = self._call_function(name, node, why, real, args, kwargs)
        return self._unknown(why, real, (args, kwargs)) if done is None else done

    def _call_module(
        self, module: nn.Module, path: str, why: str, real: Any, args: Any, kwargs: Any
    ) -> Any:
        owned = {
            name: Parameter(self.first_name[f"{path}.{name}"], tensor.shape)
            for name, tensor in module.state_dict(keep_vars=True).items()
        }
        if len(args) != 1 or kwargs or not isinstance(args[0], Labels):
            return self._unknown(why, real, (args, kwargs, owned))
        x = args[0]
        weight, bias = owned.get("weight"), owned.get("bias")
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return self._unknown(f"{why}, which has hooks", real, (args, kwargs, owned))
        kind = type(module)  # exactly: a subclass may compute something else
        if kind in CONVOLUTIONS + TRANSPOSED and weight is not None:
            groups, transposed = int(module.groups), kind in TRANSPOSED  # type: ignore[arg-type]
            return self._convolution(x, weight, bias, groups, why, real, transposed=transposed)
        if kind is nn.Linear and weight is not None:
            return self._contraction(x, weight, bias, 1, -1, (1, 0), why, real)
        if kind in CHANNEL_NORMS:
            statistics = (owned.get("running_mean"), owned.get("running_var"))
            return self._per_channel(x, (*statistics, weight, bias), why)
        if kind in (nn.LayerNorm, nn.RMSNorm):
            axes = len(module.normalized_shape)  # type: ignore[arg-type]
            return self._layer_norm(x, axes, (weight, bias), why)
        if kind is nn.GroupNorm:
            return self._group_norm(x, int(module.num_groups), (weight, bias), why)  # type: ignore[arg-type]
        if kind is nn.PReLU:
            return self._per_channel(x, (weight,), why)
        if kind in SHARE_MODULES:
            return self._share(x, why)
        if kind in ELEMENTWISE_MODULES:
            return self._elementwise([x], real, why)
        if kind in MOVE_MODULES:
            return self._move(module, args, kwargs, real)
        if kind in RESIZE_MODULES:
            return self._spatial(x, real, len(x.shape) - 2, why)
        if kind in SPATIAL_MODULES and isinstance(real, Tensor):
            return self._spatial(x, real, SPATIAL_MODULES[kind], why)
        return self._unknown(why, real, (args, kwargs, owned))

    def _call_function(
        self, name: str, node: fx.Node, why: str, real: Any, args: Any, kwargs: Any
    ) -> Any:
        name = name.rstrip("_")
        if name in MOVES or name in JOINS:
            args, kwargs = self._materialised(args), self._materialised(kwargs)
        if name in MOVES:
            if any(isinstance(value, Labels) for value in _flat((args[1:], kwargs))):
                return None  # an index that is itself computed
            if name == "getattr" and args[1] not in ("T", "mT", "data"):
                return None
            target = node.target
            if name == "view":
                target = Tensor.reshape  # labels are not laid out like the data
            elif node.op == "call_method":
                target = getattr(Tensor, str(node.target))
            return self._move(target, args, kwargs, real)  # type: ignore[arg-type]
        if name in JOINS:
            return self._concatenation(name, args, kwargs)
        if name in CONTRACTIONS:
            return self._functional_contraction(name, args, kwargs, why, real)
        if name in CONSTANTS:
            return self._same_everywhere(real)
        tensors = [v for v in _flat((args, kwargs)) if isinstance(v, Labels | Parameter)]
        if not tensors or not isinstance(real, Tensor):
            return None
        if name in ELEMENTWISE:
            return self._elementwise([self._labels(v) for v in tensors], real, why)
        x = self._labels(tensors[0])
        if name in CASTS and x.shape == real.shape:
            return x
        if name in RESHAPES:
            change = Tensor.expand if name == "expand_as" else Tensor.reshape
            return Labels(*(compact(change(part, real.shape)) for part in (x.units, x.sites)))
        if name == "prelu":
            return self._per_channel(x, (_argument(args, kwargs, 1, "weight"),), why)
        if name == "batch_norm":
            names = ("running_mean", "running_var", "weight", "bias")
            given = [_argument(args, kwargs, i + 1, part) for i, part in enumerate(names)]
            return self._per_channel(x, given, why)
        if name in ("layer_norm", "rms_norm"):
            axes = len(_argument(args, kwargs, 1, "normalized_shape"))
            affine = (_argument(args, kwargs, 2, "weight"), _argument(args, kwargs, 3, "bias"))
            return self._layer_norm(x, axes, affine if name == "layer_norm" else affine[:1], why)
        if name == "group_norm":
            affine = (_argument(args, kwargs, 2, "weight"), _argument(args, kwargs, 3, "bias"))
            return self._group_norm(x, _argument(args, kwargs, 1, "num_groups"), affine, why)
        if len(tensors) > 1:
            return None
        if name in SPATIAL:
            return self._spatial(x, real, SPATIAL[name], why)
        if name in RESIZES:
            return self._spatial(x, real, len(x.shape) - 2, why)
        if name == "pad":
            return self._pad(x, real, args, kwargs, why)
        if name in REDUCTIONS:
            return self._reduce(x, real, args, kwargs, why)
        if name in SHARES:
            return self._share(x, why)
        return None

    # -- rules ------------------------------------------------------------------------------------

    def _unknown(self, why: str, real: Any, inputs: Any) -> Any:
        """Fix whatever goes in; what comes out cannot be permuted either."""
        for value in _flat(inputs):
            if isinstance(value, Labels):
                self.ledger.fix(value.units, why)
            elif isinstance(value, Parameter):
                self._refuse(value.key, why)
        return _nested(real, lambda part: constant(FIXED, part.shape))

    def _move(self, target: Callable[..., Any], args: Any, kwargs: Any, real: Any) -> Any:
        units = target(*_pick(args, "units"), **_pick(kwargs, "units"))
        sites = target(*_pick(args, "sites"), **_pick(kwargs, "sites"))
        if isinstance(units, Tensor):
            assert units.shape == real.shape
            return Labels(compact(units), compact(sites))
        return tuple(Labels(compact(u), compact(s)) for u, s in zip(units, sites, strict=True))

    def _concatenation(self, name: str, args: Any, kwargs: Any) -> Any:
        parts = _argument(args, kwargs, 0, "tensors")
        axis = _argument(args, kwargs, 1, "dim", kwargs.get("axis", 0))
        if name == "stack":
            parts = [Labels(p.units.unsqueeze(axis), p.sites.unsqueeze(axis)) for p in parts]
        return join(parts, axis)

    def _elementwise(self, values: list[Labels], real: Tensor, why: str) -> Labels:
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

    def _per_channel(self, x: Labels, parameters: Iterable[Any], why: str) -> Labels | None:
        """Scale, shift or normalise each channel of axis 1 by itself."""
        axis = 1 if len(x.shape) > 1 else 0
        vector = self.ledger.vector(x, axis, why)
        return self._affine(x, vector.labels, parameters, why)

    def _layer_norm(self, x: Labels, axes: int, affine: Iterable[Any], why: str) -> Labels | None:
        first = len(x.shape) - axes
        varying = [axis for axis, size in enumerate(core(x.units).shape) if size > 1]
        if len(varying) > 1 or any(axis < first for axis in varying):
            return None
        if varying:
            self.ledger.vector(x, varying[0], why)
        for parameter in affine:
            if parameter is not None:
                labels = self._labels(parameter).units
                self.ledger.tie(labels, core(x.units).reshape(core(x.units).shape[first:]), why)
        return x

    def _group_norm(self, x: Labels, groups: int, affine: Iterable[Any], why: str) -> Labels | None:
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
            labels = self._labels(parameter).units
            if labels.numel() == channels.numel():
                self.ledger.tie(labels.reshape(-1), channels, why)
            elif labels.numel() == 1:
                self.ledger.fix(labels, f"{why}, one value for all channels")
            else:
                return None
        return x

    def _spatial(self, x: Labels, real: Tensor, axes: int, why: str) -> Labels | None:
        """Work on each channel by itself, over the ``axes`` last axes."""
        varying = [axis for axis, size in enumerate(core(x.units).shape) if size > 1]
        if len(varying) > 1 or any(axis >= real.ndim - axes for axis in varying):
            return None
        axis = varying[0] if varying else max(real.ndim - axes - 1, 0)
        return channelwise(self.ledger.vector(x, axis, why), real.shape, axis)

    def _pad(self, x: Labels, real: Tensor, args: Any, kwargs: Any, why: str) -> Labels | None:
        widths = list(_argument(args, kwargs, 1, "pad"))
        mode = _argument(args, kwargs, 2, "mode", "constant")
        axes = max((i // 2 + 1 for i, width in enumerate(widths) if width), default=0)
        if axes < real.ndim - 1:
            return self._spatial(x, real, axes, why)
        if axes != real.ndim - 1 or mode != "constant" or min(widths) < 0:
            return None
        # New channels of one constant: alike, so that each may take the place of another.
        vector = self.ledger.vector(x, 1, why)
        before, after = widths[2 * axes - 2 : 2 * axes]
        labels = [self.ledger.fresh(before), vector.labels, self.ledger.fresh(after)]
        patterns = torch.nn.functional.pad(vector.patterns, (before, after))
        return channelwise(Vector(torch.cat(labels), patterns), real.shape, 1)

    def _same_everywhere(self, real: Tensor) -> Labels:
        if real.ndim < 2:
            return constant(FIXED, real.shape)
        n = real.shape[1]
        vector = Vector(self.ledger.fresh(n), torch.zeros(n, dtype=torch.int64))
        return channelwise(vector, real.shape, 1)

    def _reduce(self, x: Labels, real: Tensor, args: Any, kwargs: Any, why: str) -> Labels | None:
        rank = len(x.shape)
        axes = _argument(args, kwargs, 1, "dim", kwargs.get("axis"))
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

    def _share(self, x: Labels, why: str) -> Labels | None:
        """Divide by a sum, over channels or over pixels: neither knows the order of units."""
        varying = [axis for axis, size in enumerate(core(x.units).shape) if size > 1]
        if len(varying) > 1:
            return None
        if varying:
            self.ledger.vector(x, varying[0], why)
        return x

    def _functional_contraction(
        self, name: str, args: Any, kwargs: Any, why: str, real: Tensor
    ) -> Labels | None:
        x, weight = args[0], _argument(args, kwargs, 1, "weight")
        bias = _argument(args, kwargs, 2, "bias")
        if not isinstance(x, Labels) or not isinstance(weight, Parameter):
            return None
        if name == "linear":
            return self._contraction(x, weight, bias, 1, -1, (1, 0), why, real)
        groups = _argument(args, kwargs, 6, "groups", 1)
        return self._convolution(x, weight, bias, groups, why, real)

    def _convolution(
        self, x: Labels, weight: Parameter, bias: Any, groups: int, why: str, real: Tensor,
        *, transposed: bool = False,
    ) -> Labels | None:  # fmt: skip
        channel_axis = real.ndim - (len(weight.shape) - 2) - 1  # images may come without batch axis
        sides = (0, 1) if transposed else (1, 0)
        return self._contraction(x, weight, bias, groups, channel_axis, sides, why, real)

    def _contraction(
        self, x: Labels, weight: Parameter, bias: Any, groups: int, channel_axis: int,
        sides: tuple[int, int], why: str, real: Tensor,
    ) -> Labels | None:  # fmt: skip
        """Sum over the units along axis ``sides[0]`` of the weight, make those of ``sides[1]``."""
        ledger, key = self.ledger, weight.key
        if key in self.elementwise or key in self.refused:
            self._refuse(key, f"{key} is a weight and acts element by element too")
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
            ledger.tie(self._labels(bias).units, made.labels, why)
        return channelwise(made, real.shape, channel_axis)

    def _made(self, key: str, axis: int, n: int) -> Vector:
        """Return the units that the weight ``key`` makes, the same ones at each of its calls."""
        if (key, axis) not in self.made:
            none = torch.zeros(n, dtype=torch.int64)
            self.made[key, axis] = Vector(self.ledger.fresh(n), none)
        return self.made[key, axis]

    # -- parameters -------------------------------------------------------------------------------

    def _attribute(self, target: str, real: Any) -> Any:
        if not isinstance(real, Tensor):
            return real
        if target in self.first_name:
            return Parameter(self.first_name[target], real.shape)
        return constant(FIXED, real.shape)  # not in the state dict: nothing can permute it

    def _labels(self, value: Labels | Parameter) -> Labels:
        """Return the labels of an activation, or those of a parameter used element by element."""
        if isinstance(value, Labels):
            return value
        key, shape = value.key, value.shape
        if any(use.tensor == key for use in self.ledger.uses.values()):
            self._refuse(key, f"{key} is a weight and acts element by element too")
        if key in self.refused:
            return constant(FIXED, shape)
        if key not in self.elementwise:
            long = [axis for axis, size in enumerate(shape) if size > 1]
            units = self.ledger.fresh(shape.numel()).view(shape)
            # The first axis of more than one element is taken for the units', the rest for sites.
            self.elementwise[key] = Labels(units, grid(shape, long[0] if long else None))
        return self.elementwise[key]

    def _materialised(self, values: Any) -> Any:
        return _nested(values, self._labels, of=Parameter)

    def _refuse(self, key: str, why: str) -> None:
        """Fix every unit along any axis of the parameter ``key``, now and from now on."""
        self.refused.setdefault(key, why)
        for use in self.ledger.uses.values():
            if use.tensor == key:
                self.ledger.fix(use.labels, why)
        if key in self.elementwise:
            self.ledger.fix(self.elementwise[key].units, why)


def _name(function: Any) -> str:
    """Return the name of a library function; of any other, a name that no rule has."""
    name = str(getattr(function, "__name__", function))
    module = getattr(function, "__module__", None) or "torch"  # builtin methods of torch have none
    return name if module.split(".")[0] in LIBRARIES else f"{module}.{name}"


def _argument(args: Any, kwargs: Any, position: int, name: str, default: Any = None) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _flat(values: Any) -> list[Any]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, tuple | list) and not isinstance(values, torch.Size):
        return [part for value in values for part in _flat(value)]
    return [values]


def _nested(values: Any, change: Callable[[Any], Any], *, of: type = Tensor) -> Any:
    """Apply ``change`` to everything of the type ``of`` inside tuples, lists and dicts."""
    if isinstance(values, of):
        return change(values)
    if isinstance(values, dict):
        return {key: _nested(value, change, of=of) for key, value in values.items()}
    if isinstance(values, tuple | list) and not isinstance(values, torch.Size):
        parts = [_nested(value, change, of=of) for value in values]
        return type(values)(*parts) if hasattr(values, "_fields") else type(values)(parts)
    return values


def _pick(values: Any, part: str) -> Any:
    return _nested(values, lambda labels: getattr(labels, part), of=Labels)


def _with_rank(labels: Tensor, rank: int) -> Tensor:
    return labels.reshape([1] * (rank - labels.ndim) + list(labels.shape))
