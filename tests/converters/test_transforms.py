"""Transforms: each does what its name says, and its inverse undoes it exactly."""

import numpy as np
import pytest

from converters import transforms
from converters.transforms import Transform

ARRAYS = np.random.default_rng(0)


def normal(*shape):
    return ARRAYS.normal(size=shape).astype(np.float32)


CASES = {
    "same": (normal(3, 4),),
    "transpose": (normal(3, 4),),
    "fuse_qkv": (normal(4, 6), normal(4, 6), normal(4, 6)),
    "swap_scale_shift": (normal(8, 3),),
    "split_attention_mlp": (normal(4, 20),),
    "split_qkv_up": (normal(28, 4), normal(28)),
    "split_gate_up": (normal(10, 4),),
    "split_qkv_gate_up": (normal(22, 4),),
    "join_patch": (normal(5, 3, 2, 2),),
    "pack_rows": (normal(12, 3),),
    "pack_columns": (normal(3, 12),),
    "square": (normal(1, 16, 3),),
    "conv": (normal(2, 3, 5, 7),),
    "linear_from_conv1x1": (normal(2, 3, 1, 1),),
}


def test_every_transform_has_a_case():
    assert {name for name, value in vars(transforms).items() if isinstance(value, Transform)} == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_backward_undoes_forward_exactly(name):
    transform = vars(transforms)[name]
    back = transform.backward(transform.forward(CASES[name]))
    assert len(back) == len(CASES[name])
    assert all(np.array_equal(a, b) for a, b in zip(back, CASES[name], strict=True))


@pytest.mark.parametrize("name", ["fuse_qkv", "swap_scale_shift", "pack_rows"])
def test_matrices_and_their_biases_take_the_same_transform(name):
    vectors = tuple(tensor[:, 0] for tensor in CASES[name])
    transform = vars(transforms)[name]
    from_matrix = transform.forward(CASES[name])[0]
    assert np.array_equal(from_matrix[0], transform.forward(vectors)[0])
    assert all(
        np.array_equal(a, b) for a, b in zip(transform.backward(transform.forward(vectors)), vectors, strict=True)
    )


def test_fused_columns_are_q_then_k_then_v():
    q, k, v = CASES["fuse_qkv"]
    x = normal(5, 6)
    (fused,) = transforms.fuse_qkv.forward((q, k, v))
    assert np.allclose(x @ fused, np.concatenate([x @ q.T, x @ k.T, x @ v.T], axis=-1), atol=1e-5)


def test_swapping_puts_shift_before_scale():
    (weight,) = CASES["swap_scale_shift"]
    (swapped,) = transforms.swap_scale_shift.forward((weight,))
    scale, shift = np.split(normal(2, 3) @ weight.T, 2, axis=-1)
    assert swapped.shape == (3, 8) and scale.shape == shift.shape
    assert np.array_equal(swapped, np.concatenate([weight[4:].T, weight[:4].T], axis=-1))


def test_the_fused_output_matrix_splits_into_attention_and_mlp():
    (weight,) = CASES["split_attention_mlp"]
    attention, mlp = normal(4), normal(16)
    parts = transforms.split_attention_mlp.forward((weight,))
    assert np.allclose(attention @ parts[0] + mlp @ parts[1], weight @ np.concatenate([attention, mlp]), atol=1e-5)


def test_the_fused_input_matrix_splits_into_qkv_and_mlp():
    weight, bias = CASES["split_qkv_up"]
    qkv_kernel, up_kernel, qkv_bias, up_bias = transforms.split_qkv_up.forward((weight, bias))
    x = normal(4)
    fused = np.concatenate([x @ qkv_kernel + qkv_bias, x @ up_kernel + up_bias])
    assert np.allclose(fused, weight @ x + bias, atol=1e-5)


def test_a_1x1_convolution_is_a_matrix():
    (weight,) = CASES["linear_from_conv1x1"]
    (matrix,) = transforms.linear_from_conv1x1.forward((weight,))
    x = normal(3)
    assert np.allclose(x @ matrix, np.einsum("oiyx,i->o", weight, x), atol=1e-6)


def test_a_patch_is_convolved_as_packed_tokens_are_multiplied():
    (weight,) = CASES["join_patch"]
    (matrix,) = transforms.join_patch.forward((weight,))
    patch = normal(3, 2, 2)  # channels, rows, columns: the order of a packed token
    assert np.allclose(patch.reshape(-1) @ matrix, np.einsum("ocyx,cyx->o", weight, patch), atol=1e-5)
