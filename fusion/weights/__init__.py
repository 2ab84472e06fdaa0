"""Kernels on tensors and state dicts: arithmetic, interpolation, TIES, streaming over checkpoints.

Everything here is plain torch, independent of models, pools and configuration.
"""

from fusion.weights.finite import is_finite
from fusion.weights.linear import lerp, weighted_mean
from fusion.weights.operands import normalised_weights
from fusion.weights.pickled_file import load_pickled, require_dense, state_dicts
from fusion.weights.precision import exact_device, image_dtype, widened, working_dtype
from fusion.weights.safetensors_file import (
    SafetensorsSource,
    load_safetensors,
    map_safetensors,
    read_metadata,
    save_safetensors,
)
from fusion.weights.safetensors_writer import SafetensorsWriter, writing_safetensors
from fusion.weights.source import (
    ConvertedSource,
    ModuleSource,
    RenamedSource,
    StateDictSource,
    TensorInfo,
    TensorSource,
    load_tensors,
    tensors_of,
)
from fusion.weights.spherical import slerp, spherical_mean
from fusion.weights.state_dict import (
    StateDict,
    require_same_keys,
    state_dict_add,
    state_dict_avg,
    state_dict_mul,
    state_dict_sub,
    state_dict_to_vector,
    state_dict_weighted_sum,
    trainable_state_dict,
    vector_to_state_dict,
)
from fusion.weights.ties_merging import ties, trim

__all__ = [
    "ConvertedSource",
    "ModuleSource",
    "RenamedSource",
    "SafetensorsSource",
    "SafetensorsWriter",
    "StateDict",
    "StateDictSource",
    "TensorInfo",
    "TensorSource",
    "exact_device",
    "image_dtype",
    "is_finite",
    "lerp",
    "load_pickled",
    "load_safetensors",
    "load_tensors",
    "map_safetensors",
    "normalised_weights",
    "read_metadata",
    "require_dense",
    "require_same_keys",
    "save_safetensors",
    "slerp",
    "spherical_mean",
    "state_dict_add",
    "state_dict_avg",
    "state_dict_mul",
    "state_dict_sub",
    "state_dict_to_vector",
    "state_dict_weighted_sum",
    "state_dicts",
    "tensors_of",
    "ties",
    "trainable_state_dict",
    "trim",
    "vector_to_state_dict",
    "weighted_mean",
    "widened",
    "working_dtype",
    "writing_safetensors",
]
