"""Operations element by element, and those that make constants."""

from __future__ import annotations

from functools import reduce as fold

from fusion.alignment.labels import Labels, alike
from fusion.alignment.primitives import meet
from fusion.alignment.rules.operation import Operation, Rule

# fmt: off
ELEMENTWISE = frozenset((
    # of one tensor
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bitwise_not", "ceil", "celu",
    "clamp", "clamp_max", "clamp_min", "cos", "cosh", "deg2rad", "elu", "erf", "erfc", "erfinv",
    "exp", "exp2", "expm1", "floor", "frac", "gelu", "hardshrink", "hardsigmoid", "hardswish",
    "hardtanh", "isfinite", "isinf", "isnan", "leaky_relu", "log", "log10", "log1p", "log2",
    "log_sigmoid_forward", "logical_not", "logit", "mish", "nan_to_num", "native_dropout", "neg",
    "reciprocal", "relu", "relu6", "round", "rsqrt", "selu", "sgn", "sigmoid", "sign", "silu",
    "sin", "sinc", "sinh", "softplus", "softshrink", "sqrt", "square", "tan", "tanh", "threshold",
    "trunc",
    # the same values
    "_conj", "_conj_physical", "_to_copy", "alias", "clone", "contiguous", "detach", "lift_fresh",
    "lift_fresh_copy", "positive", "real",
    # of several
    "_prelu_kernel", "add", "addcdiv", "addcmul", "atan2", "bitwise_and", "bitwise_or",
    "bitwise_xor", "complex", "copysign", "div", "eq", "floor_divide", "fmax", "fmin", "fmod",
    "ge", "gt", "hypot", "le", "lerp", "logaddexp", "logical_and", "logical_or", "logical_xor",
    "lt", "masked_fill", "maximum", "minimum", "mul", "ne", "polar", "pow", "remainder", "rsub",
    "sub", "where",
    "xlogy",
))
ALIKE = frozenset((
    "empty", "empty_like", "empty_strided", "full", "full_like", "new_empty", "new_empty_strided",
    "new_full", "new_ones", "new_zeros", "ones", "ones_like", "scalar_tensor", "zero", "zeros",
    "zeros_like",
    # Draws are alike too: a permutation keeps their distribution.
    "bernoulli", "normal_functional", "rand", "rand_like", "randn", "randn_like",
))
# fmt: on


def elementwise(op: Operation) -> tuple[Labels, ...]:
    """Tie the units that meet."""
    one = fold(lambda a, b: meet(op.ledger, a, b, op.why), op.labels())
    return tuple(one.expanded(shape) for shape in op.shapes)


def gated(op: Operation) -> Labels:
    """Multiply one half along an axis by the sigmoid of the other."""
    x = op["self"]
    axis = x.axis(op["dim"])
    first, second = (
        x.changed(lambda part, i=i: part.chunk(2, axis)[i], op.shape) for i in range(2)
    )
    return meet(op.ledger, first, second, op.why)


def constant(op: Operation) -> Labels:
    """Make elements that are all equal."""
    return alike(op.shape)


def replaced(op: Operation) -> Labels:
    """Overwrite a whole tensor by another, or by a number."""
    source = op["src"] if op.name == "copy" else op["value"]
    if not isinstance(source, Labels):
        return alike(op.shape)
    return source.lifted(len(op.shape)).expanded(op.shape)


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(ALIKE, constant),
    "glu": gated,
    "copy": replaced,
    "fill": replaced,
}
