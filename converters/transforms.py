"""The changes of layout between PyTorch's tensors and our leaves: a handful of named, pure, invertible functions.

1. A `Transform` takes the source tensors of one rule, in order, to the slices of its leaves, in order, and back.
2. Sizes are never parameters: where a fused tensor must be cut is read off another axis of it.
3. Forward transforms return views wherever NumPy can, so that a memory-mapped tensor is read only where it is used.

Symbols: `out`, `in` are a matrix's axes. PyTorch stores matrices [out in] and convolutions [out in height width]
(OIHW); leaves are [in out] and HWIO. A vector is its own transpose, so weights and biases share a transform.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from difffract_jax.models.sampler import PATCH

Tensors = tuple[np.ndarray, ...]


class Transform(NamedTuple):
    """A named change of layout from source tensors to leaf slices, with its exact inverse.

    Attributes:
        name: how to say it.
        forward: source tensors, in the rule's order -> leaf slices, in the rule's order.
        backward: the inverse.
    """

    name: str
    forward: Callable[[Tensors], Tensors]
    backward: Callable[[Tensors], Tensors]


def _each(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tuple(change(tensor) for tensor in tensors)


def _fuse_qkv(tensors: Tensors) -> Tensors:
    return (np.concatenate([tensor.T for tensor in tensors], axis=-1),)


def _split_qkv(tensors: Tensors) -> Tensors:
    return tuple(part.T for part in np.split(tensors[0], 3, axis=-1))


def _swap_halves(tensor: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(tensor, 2, axis=-1)[::-1], axis=-1)


def _split_attention_mlp(tensors: Tensors) -> Tensors:
    (weight,) = tensors  # [d_model, d_model + d_ff]: the attention's columns are as many as there are rows
    width = weight.shape[0]
    return weight[:, :width].T, weight[:, width:].T


def _join_attention_mlp(tensors: Tensors) -> Tensors:
    return (np.concatenate([tensor.T for tensor in tensors], axis=1),)


def _split_qkv_up(tensors: Tensors) -> Tensors:
    weight, bias = tensors  # [3 d_model + d_ff, d_model]: the weight's columns tell where q, k, v end, for both
    width = 3 * weight.shape[1]
    return weight[:width].T, weight[width:].T, bias[:width], bias[width:]


def _join_qkv_up(tensors: Tensors) -> Tensors:
    qkv_kernel, up_kernel, qkv_bias, up_bias = tensors
    return np.concatenate([qkv_kernel.T, up_kernel.T]), np.concatenate([qkv_bias, up_bias])


def _split_gate_up(tensors: Tensors) -> Tensors:
    (weight,) = tensors  # [2 d_ff, d_model]: what is activated comes first
    return tuple(half.T for half in np.split(weight, 2))


def _join_gate_up(tensors: Tensors) -> Tensors:
    return (np.concatenate([tensor.T for tensor in tensors]),)


def _split_qkv_gate_up(tensors: Tensors) -> Tensors:
    (weight,) = tensors  # [3 d_model + 2 d_ff, d_model]: the weight's columns tell where q, k, v end
    width = 3 * weight.shape[1]
    return weight[:width].T, *_split_gate_up((weight[width:],))


def _join_patch(tensors: Tensors) -> Tensors:
    (weight,) = tensors  # [d_model, channels, rows, columns] of a patch, whose tokens are packed in this order
    return (weight.reshape(weight.shape[0], -1).T,)


def _split_patch(tensors: Tensors) -> Tensors:
    (kernel,) = tensors
    return (kernel.T.reshape(kernel.shape[1], -1, PATCH, PATCH),)


def _pack_rows(tensor: np.ndarray) -> np.ndarray:
    parts = tensor.reshape(PATCH, PATCH, -1, *tensor.shape[1:])  # [rows columns channels ...]
    return np.moveaxis(parts, 2, 0).reshape(tensor.shape).T


def _unpack_rows(tensor: np.ndarray) -> np.ndarray:
    rows = tensor.T
    parts = rows.reshape(-1, PATCH, PATCH, *rows.shape[1:])
    return np.moveaxis(parts, 0, 2).reshape(rows.shape)


def _pack_columns(tensor: np.ndarray) -> np.ndarray:
    return _pack_rows(tensor.T).T


def _unpack_columns(tensor: np.ndarray) -> np.ndarray:
    return _unpack_rows(tensor.T).T


def _square(tensors: Tensors) -> Tensors:
    (table,) = tensors  # [1, side * side, d_model]
    side = math.isqrt(table.shape[1])
    return (table.reshape(side, side, -1),)


def _flatten(tensors: Tensors) -> Tensors:
    (table,) = tensors
    return (table.reshape(1, -1, table.shape[-1]),)


same = Transform("same", _each(lambda tensor: tensor), _each(lambda tensor: tensor))
transpose = Transform("transpose", _each(np.transpose), _each(np.transpose))
fuse_qkv = Transform("fuse q, k, v (matrices also transposed)", _fuse_qkv, _split_qkv)
swap_scale_shift = Transform(
    "swap scale and shift (matrices also transposed)",
    _each(lambda tensor: _swap_halves(tensor.T)),
    _each(lambda tensor: _swap_halves(tensor).T),
)
split_attention_mlp = Transform("split columns: attention, MLP", _split_attention_mlp, _join_attention_mlp)
split_qkv_up = Transform("split rows: q k v, MLP up", _split_qkv_up, _join_qkv_up)
split_gate_up = Transform("split rows: MLP gate, up", _split_gate_up, _join_gate_up)
split_qkv_gate_up = Transform("split rows: q k v, MLP gate, up", _split_qkv_gate_up, _join_gate_up)
join_patch = Transform("convolution of a patch -> matrix on packed tokens", _join_patch, _split_patch)
pack_rows = Transform("rows, columns, channels of a patch -> packed order", _each(_pack_rows), _each(_unpack_rows))
pack_columns = Transform(
    "matrix that reads rows, columns, channels of a patch -> packed order", _each(_pack_columns), _each(_unpack_columns)
)
square = Transform("rows of a table -> rows and columns", _square, _flatten)
conv = Transform(
    "convolution OIHW -> HWIO",
    _each(lambda tensor: tensor.transpose(2, 3, 1, 0)),
    _each(lambda tensor: tensor.transpose(3, 2, 0, 1)),
)
linear_from_conv1x1 = Transform(
    "1 x 1 convolution -> matrix",
    _each(lambda tensor: tensor[:, :, 0, 0].T),
    _each(lambda tensor: tensor.T[:, :, None, None]),
)
