"""fp8 weights are widened exactly and multiplied by their scales; every other way of quantising is told by name."""

import ml_dtypes
import numpy as np
import pytest
import torch

from converters.quantised import hint_keys, kind_of, scale_fits, scale_keys, widen

CODES = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn), (ml_dtypes.float8_e5m2, torch.float8_e5m2)],
)
def test_every_fp8_value_is_widened_exactly(ours, theirs):
    wide = widen(CODES.view(ours), None)
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide, torch.from_numpy(CODES).view(theirs).float().numpy())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,), (3, 1)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_scale_is_multiplied_in_float32(shape, dtype):
    weight = np.linspace(-400, 400, 12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.float8_e4m3fn)
    scale = np.array([0.3, 0.7, 1e-3], np.float32)[: max(1, int(np.prod(shape)))].astype(dtype).reshape(shape)
    rows = np.broadcast_to(scale.astype(np.float32).ravel(), 3)[:, None]
    assert np.array_equal(widen(weight, scale), weight.astype(np.float32) * rows)


def test_a_scale_is_one_number_or_one_per_row():
    assert all(scale_fits((3, 4), scale) for scale in ((), (1,), (1, 1), (3,), (3, 1)))
    assert not any(scale_fits((3, 4), scale) for scale in ((4,), (1, 4), (3, 4), (0,), (3, 2)))


def test_scales_and_hints_belong_to_a_weight_that_is_there():
    keys = [
        "a.weight",
        "a.scale_weight",
        "a.scale_input",
        "b.weight",
        "b.weight_scale",
        "b.input_scale",
        "b.comfy_quant",
    ]
    orphans = ["c.scale_weight", "c.input_scale", "norm.scale", "d.scaled_fp8"]
    assert scale_keys(keys + orphans) == {"a.weight": "a.scale_weight", "b.weight": "b.weight_scale"}
    assert hint_keys([*keys, *orphans, "scaled_fp8"]) == {
        "a.scale_input",
        "b.input_scale",
        "b.comfy_quant",
        "scaled_fp8",
    }


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"a.weight": "U8", "a.weight.absmax": "U8", "a.weight.quant_map": "F32"}, "bitsandbytes in 4 bits"),
        ({"a.weight": "U8", "a.weight.quant_state.bitsandbytes__nf4": "U8"}, "bitsandbytes in 4 bits"),
        ({"a.weight": "I8", "a.SCB": "F32"}, "bitsandbytes in 8 bits"),
        ({"a.qweight": "I8", "a.wscales": "BF16", "a.lora_down": "BF16"}, "SVDQuant"),
        ({"a.qweight": "I32", "a.qzeros": "I32", "a.scales": "F16"}, "GPTQ or AWQ"),
        ({"a.qweight": "I32", "a.scales": "F16"}, "packed integers"),
        ({"a.weight": "U8", "a.weight_scale": "F8_E4M3", "a.weight_scale_2": "F32"}, "NVFP4"),
        ({"a.weight": "F8_E4M3", "a.weight_scale_inv": "F32"}, "a scale for every tile"),
        ({"a.weight._data": "I8", "a.weight._scale": "BF16"}, "optimum-quanto"),
        ({"a.weight": "F4", "b.weight": "BF16"}, "packed numbers of type F4"),
        ({"a.weight": "F8_E4M3", "a.weight_scale": "F8_E8M0"}, "packed numbers of type F8_E8M0"),
        ({"a.bias": "BF16", "a.weight": "I8"}, "integers of type I8"),
    ],
)
def test_what_cannot_be_read_is_named(tensors, kind):
    found = kind_of(tensors)
    assert found is not None and kind in found[0] and found[1] in tensors


def test_full_precision_and_fp8_are_not_refused():
    plain = {
        "a.weight": "F8_E4M3",
        "b.weight": "F8_E5M2",
        "a.scale_weight": "F32",
        "a.comfy_quant": "U8",
        "c.bias": "BF16",
    }
    assert kind_of(plain | {"position_ids": "I64", "lost": None, "norm.scale": "F32"}) is None
