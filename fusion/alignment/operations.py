"""The operations of torch and torchvision that have a rule, by what they do to channels."""

from __future__ import annotations

from torch import nn

# Functions and methods by name; a trailing underscore (in place) is dropped before the look-up.
# fmt: off
MOVES = frozenset((
    "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "view", "reshape",
    "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "getitem", "getattr", "chunk", "split",
    "split_with_sizes", "tensor_split", "unbind", "narrow", "select", "expand", "flip", "roll",
    "channel_shuffle", "pixel_shuffle", "pixel_unshuffle",
))
JOINS = frozenset(("cat", "concat", "concatenate", "stack"))
ELEMENTWISE = frozenset((
    "add", "iadd", "sub", "isub", "rsub", "mul", "imul", "multiply", "div", "truediv", "itruediv",
    "true_divide", "pow", "neg", "abs", "square", "sqrt", "rsqrt", "exp", "log", "reciprocal",
    "erf", "maximum", "minimum", "clamp", "clip", "clamp_min", "clamp_max", "where", "lerp",
    "addcmul",
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid",
    "logsigmoid", "hardswish", "hardsigmoid", "hardtanh", "tanh", "softplus", "softsign",
    "hardshrink", "softshrink", "tanhshrink", "threshold", "dropout", "dropout1d", "dropout2d",
    "dropout3d", "alpha_dropout", "feature_alpha_dropout", "stochastic_depth", "clone",
    "contiguous", "detach", "float", "double", "half", "bfloat16",
))
CASTS = frozenset(("to", "type", "type_as"))  # further tensors give only a type
RESHAPES = frozenset(("expand_as", "view_as", "reshape_as"))  # further tensors give only a shape
CONTRACTIONS = frozenset(("conv1d", "conv2d", "conv3d", "linear"))
CONSTANTS = frozenset(("zeros_like", "new_zeros", "zeros", "ones_like", "new_ones", "ones"))
SPATIAL = {  # name -> number of trailing axes over which it works
    f"{mode}{kind}_pool{n}d": n
    for n in (1, 2, 3) for mode in ("", "adaptive_") for kind in ("avg", "max", "lp")
}
RESIZES = frozenset(("interpolate", "upsample"))  # every axis behind the channels
REDUCTIONS = frozenset(("mean", "sum", "amax", "amin", "var", "std", "logsumexp"))
SHARES = frozenset(("softmax", "softmin", "log_softmax", "normalize"))  # x over a sum of many x

# Modules, by their exact type: a subclass may compute something else.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CHANNEL_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)
ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.LogSigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Tanh, nn.Softplus,
    nn.Softsign, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold, nn.Dropout,
    nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity,
)
SHARE_MODULES = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)
MOVE_MODULES = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle)
RESIZE_MODULES = (nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d)
SPATIAL_MODULES = {  # -> number of trailing axes over which it works
    getattr(nn, f"{name}{n}d"): n
    for n in (1, 2, 3)
    for name in (
        "AvgPool", "MaxPool", "LPPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "ReflectionPad",
        "ReplicationPad", "ConstantPad", "ZeroPad", "CircularPad",
    )
}
# fmt: on
LIBRARIES = frozenset(("torch", "_operator", "torchvision", "builtins"))  # whose names are meant
