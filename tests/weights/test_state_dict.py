"""Arithmetic on state dicts of a real network."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fusion.errors import UserError
from fusion.weights import (
    state_dict_add,
    state_dict_avg,
    state_dict_mul,
    state_dict_sub,
    state_dict_to_vector,
    state_dict_weighted_sum,
    trainable_state_dict,
    vector_to_state_dict,
)

COUNTER = "norm.num_batches_tracked"


@pytest.fixture
def pair(network):
    a = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    b = {name: tensor + 1 for name, tensor in a.items()}
    return a, b


def test_base_plus_task_vector_is_the_expert(pair):
    base, expert = pair
    result = state_dict_add(base, state_dict_sub(expert, base))
    assert list(result) == list(base)
    for name in base:
        expected = base[name] if name == COUNTER else expert[name]
        assert_close(result[name], expected)


def test_counters_are_carried_over_from_the_first_operand(pair):
    a, b = pair
    for result in (
        state_dict_sub(b, a),
        state_dict_mul(b, 0.5),
        state_dict_avg([b, a]),
        state_dict_weighted_sum([b, a], [0.1, 0.2]),
    ):
        assert result[COUNTER].dtype == torch.int64
        assert result[COUNTER] == 1


def test_sums_and_means(pair):
    a, b = pair
    total = state_dict_weighted_sum([a, b], [2, -3])
    mean = state_dict_avg([a, b])
    half = state_dict_mul(a, 0.5)
    for name in set(a) - {COUNTER}:
        assert_close(total[name], 2 * a[name] - 3 * b[name])
        assert_close(mean[name], a[name] + 0.5)
        assert torch.equal(half[name], a[name] / 2)


def test_the_mean_of_copies_is_the_copy(pair):
    mean = state_dict_avg([pair[0]] * 3)
    for name, tensor in pair[0].items():
        assert torch.equal(mean[name], tensor)


def test_operands_are_not_changed_and_not_shared(pair):
    a, b = pair
    before = {name: tensor.clone() for name, tensor in a.items()}
    for result in (state_dict_sub(a, b), state_dict_mul(a, 1.0), state_dict_avg([a])):
        for tensor in result.values():
            tensor.zero_()
    for name, tensor in before.items():
        assert torch.equal(a[name], tensor)


def test_half_precision_sums_in_float32_and_keeps_the_first_dtype():
    a = {"w": torch.ones(1, dtype=torch.bfloat16)}
    b = {"w": torch.full((1,), 2**-9)}
    total = state_dict_weighted_sum([a, b, b], [1, 2, 2])
    assert total["w"].dtype == torch.bfloat16
    assert total["w"] == 1 + 2**-7


def test_other_keys_are_an_error_that_names_them(pair):
    a, b = pair
    b["stem.wieght"] = b.pop("stem.weight")
    with pytest.raises(UserError, match=r"lacks 'stem.weight' and also has 'stem.wieght'"):
        state_dict_add(a, b)


def test_other_shapes_are_an_error_that_names_them(pair):
    a, b = pair
    b["head.bias"] = torch.zeros(7)
    with pytest.raises(UserError, match=r"head.bias is \(7,\) instead of \(4,\)"):
        state_dict_avg([a, b])


def test_each_state_dict_needs_a_weight(pair):
    with pytest.raises(UserError, match="1 weights for 2"):
        state_dict_weighted_sum(pair, [1.0])
    with pytest.raises(UserError, match="at least one"):
        state_dict_avg([])


def test_vector_and_back(pair):
    a, b = pair
    a["stem.weight"] = a["stem.weight"].to(memory_format=torch.channels_last)
    vector = state_dict_to_vector(a)
    assert vector.numel() == sum(t.numel() for t in a.values()) - 1  # without the counter
    back = vector_to_state_dict(vector, like=b)
    assert list(back) == list(a)
    for name, tensor in back.items():
        assert torch.equal(tensor, b[name] if name == COUNTER else a[name])


def test_a_vector_of_another_length_does_not_fit(pair):
    vector = state_dict_to_vector(pair[0])
    for wrong in (vector[:-1], vector[None]):
        with pytest.raises(UserError, match="elements"):
            vector_to_state_dict(wrong, pair[0])


def test_the_trainable_part_leaves_out_buffers_frozen_and_tied_names(network):
    network.head.weight.requires_grad_(False)
    trainable = trainable_state_dict(network)
    assert set(trainable) == {
        "stem.weight",
        "stem.bias",
        "conv.weight",
        "norm.weight",
        "norm.bias",
        "head.bias",
    }
    assert not any(tensor.requires_grad for tensor in trainable.values())


@st.composite
def state_dicts(draw: st.DrawFn, count: int = 2) -> list[dict[str, Tensor]]:
    """State dicts of one form: tensors of any shape, also empty or 0-dim, and counters."""
    shapes = draw(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4))
    dtypes = [
        draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64]))
        for _ in shapes
    ]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return [
        {
            f"t{n}": (8 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            for n, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
        }
        for _ in range(count)
    ]


@given(pair=state_dicts())
def test_differences_and_sums_undo_each_other(pair) -> None:
    base, expert = pair
    again = state_dict_add(state_dict_sub(expert, base), base)
    assert again.keys() == base.keys()
    for key, tensor in again.items():
        assert tensor.dtype == base[key].dtype
        wanted = expert[key]
        assert_close(
            tensor, wanted, rtol=1e-2 if tensor.dtype == torch.float16 else 1e-4, atol=0.05
        )


@given(pair=state_dicts(), weight=st.floats(0, 1))
def test_means_lie_between_and_copies_are_kept(pair, weight: float) -> None:
    one, other = pair
    for key, tensor in state_dict_avg([one, one, one]).items():
        assert torch.equal(tensor, one[key])
    mean = state_dict_weighted_sum([one, other], [weight, 1 - weight])
    for key, tensor in mean.items():
        if tensor.is_floating_point() and tensor.numel():
            slack = 0.05 if tensor.dtype == torch.float16 else 1e-3
            assert (tensor >= torch.minimum(one[key], other[key]) - slack).all()
            assert (tensor <= torch.maximum(one[key], other[key]) + slack).all()
        else:
            assert torch.equal(tensor, one[key])


@given(pair=state_dicts(count=1))
def test_a_vector_holds_all_numbers_and_gives_them_back(pair) -> None:
    (state,) = pair
    again = vector_to_state_dict(state_dict_to_vector(state), state)
    assert again.keys() == state.keys()
    for key, tensor in again.items():
        assert torch.equal(tensor, state[key])
