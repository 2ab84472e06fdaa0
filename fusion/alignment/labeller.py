"""Walks the graph of a network and finds the rule of every operation.

An operation that has no rule fixes every unit it touches: never wrong, at worst less free.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from fusion.alignment.labels import FIXED, Labels, compact, constant
from fusion.alignment.nested import argument, flat
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
from fusion.alignment.rules import Parameter, Rules
from fusion.alignment.tracing import Graph


class Labeller:
    """Walks a graph by the rules; several graphs of one network may share them."""

    def __init__(self, model: nn.Module) -> None:
        self.rules = Rules(model)

    def walk(self, graph: Graph) -> None:
        """Apply the rule of every node of ``graph``."""
        module = graph.module
        env: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            real = graph.value[node]
            args = map_arg(node.args, env.__getitem__)
            kwargs = map_arg(node.kwargs, env.__getitem__)
            if node.op == "output":
                self.rules.unknown("output", None, args)
            elif node.op == "get_attr":
                env[node] = self.rules.attribute(str(node.target), real)
            elif not any(isinstance(part, Tensor) for part in flat(real)):
                env[node] = real  # sizes and other plain numbers
            elif node.op == "placeholder":
                env[node] = constant(FIXED, real.shape)
            else:
                env[node] = self._call(module, node, real, args, kwargs)
                for value in flat(env[node]):
                    if isinstance(value, Labels):
                        self.rules.ledger.see(value)

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
        return self.rules.unknown(why, real, (args, kwargs)) if done is None else done

    def _call_module(
        self, module: nn.Module, path: str, why: str, real: Any, args: Any, kwargs: Any
    ) -> Any:
        rules = self.rules
        owned = {
            name: Parameter(rules.first_name[f"{path}.{name}"], tensor.shape)
            for name, tensor in module.state_dict(keep_vars=True).items()
            if isinstance(tensor, Tensor)  # not its extra state
        }
        if len(args) != 1 or kwargs or not isinstance(args[0], Labels):
            return rules.unknown(why, real, (args, kwargs, owned))
        x = args[0]
        weight, bias = owned.get("weight"), owned.get("bias")
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return rules.unknown(
                f"{why}, whose hooks the graph does not show", real, (args, kwargs, owned)
            )
        kind = type(module)  # exactly: a subclass may compute something else
        if kind in CONVOLUTIONS + TRANSPOSED and weight is not None:
            groups, transposed = int(module.groups), kind in TRANSPOSED  # type: ignore[arg-type]
            return rules.convolution(x, weight, bias, groups, why, real, transposed=transposed)
        if kind is nn.Linear and weight is not None:
            return rules.contraction(x, weight, bias, 1, -1, (1, 0), why, real)
        if kind in CHANNEL_NORMS:
            statistics = (owned.get("running_mean"), owned.get("running_var"))
            return rules.per_channel(x, (*statistics, weight, bias), why)
        if kind in (nn.LayerNorm, nn.RMSNorm):
            axes = len(module.normalized_shape)  # type: ignore[arg-type]
            return rules.layer_norm(x, axes, (weight, bias), why)
        if kind is nn.GroupNorm:
            return rules.group_norm(x, int(module.num_groups), (weight, bias), why)  # type: ignore[arg-type]
        if kind is nn.PReLU:
            return rules.per_channel(x, (weight,), why)
        if kind in SHARE_MODULES:
            return rules.share(x, why)
        if kind in ELEMENTWISE_MODULES:
            return rules.elementwise([x], real, why)
        if kind in MOVE_MODULES:
            return rules.move(module, args, kwargs, real)
        if kind in RESIZE_MODULES:
            return rules.spatial(x, real, len(x.shape) - 2, why)
        if kind in SPATIAL_MODULES and isinstance(real, Tensor):
            return rules.spatial(x, real, SPATIAL_MODULES[kind], why)
        return rules.unknown(why, real, (args, kwargs, owned))

    def _call_function(
        self, name: str, node: fx.Node, why: str, real: Any, args: Any, kwargs: Any
    ) -> Any:
        rules = self.rules
        name = name.rstrip("_")
        if name in MOVES or name in JOINS:
            args, kwargs = rules.materialised(args), rules.materialised(kwargs)
        if name in MOVES:
            if any(isinstance(value, Labels) for value in flat((args[1:], kwargs))):
                return None  # an index that is itself computed
            if name == "getattr" and args[1] not in ("T", "mT", "data"):
                return None
            target = node.target
            if name == "view":
                target = Tensor.reshape  # labels are not laid out like the data
            elif node.op == "call_method":
                target = getattr(Tensor, str(node.target))
            return rules.move(target, args, kwargs, real)  # type: ignore[arg-type]
        if name in JOINS:
            return rules.concatenation(name, args, kwargs)
        if name in CONTRACTIONS:
            return rules.functional_contraction(name, args, kwargs, why, real)
        if name in CONSTANTS:
            return rules.same_everywhere(real)
        tensors = [v for v in flat((args, kwargs)) if isinstance(v, Labels | Parameter)]
        if not tensors or not isinstance(real, Tensor):
            return None
        if name in ELEMENTWISE:
            return rules.elementwise([rules.labels_of(v) for v in tensors], real, why)
        x = rules.labels_of(tensors[0])
        if name in CASTS and x.shape == real.shape:
            return x
        if name in RESHAPES:
            change = Tensor.expand if name == "expand_as" else Tensor.reshape
            return Labels(*(compact(change(part, real.shape)) for part in (x.units, x.sites)))
        if name == "prelu":
            return rules.per_channel(x, (argument(args, kwargs, 1, "weight"),), why)
        if name == "batch_norm":
            names = ("running_mean", "running_var", "weight", "bias")
            given = [argument(args, kwargs, i + 1, part) for i, part in enumerate(names)]
            return rules.per_channel(x, given, why)
        if name in ("layer_norm", "rms_norm"):
            axes = len(argument(args, kwargs, 1, "normalized_shape"))
            affine = (argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "bias"))
            return rules.layer_norm(x, axes, affine if name == "layer_norm" else affine[:1], why)
        if name == "group_norm":
            affine = (argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "bias"))
            return rules.group_norm(x, argument(args, kwargs, 1, "num_groups"), affine, why)
        if len(tensors) > 1:
            return None
        if name in SPATIAL:
            return rules.spatial(x, real, SPATIAL[name], why)
        if name in RESIZES:
            return rules.spatial(x, real, len(x.shape) - 2, why)
        if name == "pad":
            return rules.pad(x, real, args, kwargs, why)
        if name in REDUCTIONS:
            return rules.reduce(x, real, args, kwargs, why)
        if name in SHARES:
            return rules.share(x, why)
        return None


def _name(function: Any) -> str:
    """Return the name of a library function; of any other, a name that no rule has."""
    name = str(getattr(function, "__name__", function))
    module = getattr(function, "__module__", None) or "torch"  # builtin methods of torch have none
    return name if module.split(".")[0] in LIBRARIES else f"{module}.{name}"
