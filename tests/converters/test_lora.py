"""LoRAs of every layout change the weights that they name, by alpha / rank x up @ down, wherever the weights lie."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from commands import run_command
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
from safetensors.numpy import save_file

from converters.check import record_transformer
from converters.export import export_pipeline
from converters.flux import FLUX_DIFFUSERS
from converters.lora_files import read_lora
from converters.mapping import save_tree
from converters.text_encoders import CLIP_TRANSFORMERS, T5_TRANSFORMERS
from converters.torch_files import TransformerInputs
from difffract_jax.config import UserError
from difffract_jax.conversion import convert_model
from difffract_jax.loading import load_pipeline, save_pipeline
from difffract_jax.lora import parse_lora
from difffract_jax.models.mmdit import Inputs, MMDiT
from difffract_jax.models.streaming import whole
from difffract_jax.models.tiny import random_pipeline
from difffract_jax.sharding import make_mesh, pipeline_shardings
from tolerances import TOL, relative_error
from traces import DEV

RANK, ALPHA, SCALE = 4, 6.0, 0.5
FUSED = {"attn.qkv": ("to_q", "to_k", "to_v")}
FOLDERS = {"transformer": "transformer", "text_encoder": "clip", "text_encoder_2": "t5"}
RUN = jax.jit(MMDiT.__call__, static_argnums=2)
TABLES = {"transformer": FLUX_DIFFUSERS, "clip": CLIP_TRANSFORMERS, "t5": T5_TRANSFORMERS}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline of FLUX.1-dev's kind, as diffusers' directory and as ours."""
    folder = tmp_path_factory.mktemp("lora")
    pipe = random_pipeline(seed=1, transformer=DEV)
    export_pipeline(pipe, folder / "diffusers")
    save_pipeline(pipe, folder / "ours")
    return folder


def tensors_of(pipe) -> dict[str, np.ndarray]:
    """Every weight of a pipeline by the name that diffusers' LoRAs have for it."""
    return {
        f"{folder}.{key}": value
        for folder, part in FOLDERS.items()
        for key, value in save_tree(whole(getattr(pipe, part)), TABLES[part])
    }


def matrices(pipe) -> dict[str, tuple[int, int]]:
    """Every matrix that a LoRA can change, and its shape."""
    found = {key.removesuffix(".weight"): value.shape for key, value in tensors_of(pipe).items() if value.ndim == 2}
    return {
        name: shape
        for name, shape in found.items()
        if "embedding" not in name and not name.endswith("shared") and "attention_bias" not in name
    }


def factors(names: dict[str, tuple[int, int]], seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random factors of some matrices, down and up."""
    rng = np.random.default_rng(seed)
    return {
        name: tuple(0.3 * rng.standard_normal(shape).astype(np.float32) for shape in ((RANK, inner), (outer, RANK)))
        for name, (outer, inner) in names.items()
    }


def save_diffusers(path: Path, made, *, prefix: str = "", metadata=None) -> Path:
    tensors = {}
    for name, (down, up) in made.items():
        tensors |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def full(home: Path) -> Path:
    """A LoRA of every matrix in diffusers' layout, its alpha in the header as diffusers writes it."""
    told = {f"{folder}.lora_alpha": ALPHA for folder in FOLDERS} | {"transformer.alpha_pattern": {"proj_mlp": 8.0}}
    pipe = load_pipeline(home / "ours")
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(told)}
    return save_diffusers(home / "full.safetensors", factors(matrices(pipe)), metadata=metadata)


def test_every_matrix_becomes_what_numpy_makes_of_it_and_diffusers_runs_it(home, full):
    before, merged = load_pipeline(home / "diffusers"), load_pipeline(home / "diffusers", lora=[f"{full}:{SCALE}"])
    names, made = matrices(before), factors(matrices(before))
    # 14 matrices of each of 3 double-stream blocks, 6 of each of 2 single-stream ones, 10 around them; 6 of each of two
    # layers of CLIP, 7 of T5.
    assert len(names) == 3 * 14 + 2 * 6 + 10 + 2 * 6 + 2 * 7
    expected = {key: value.astype(np.float64) for key, value in tensors_of(before).items()}
    for name, (down, up) in made.items():
        alpha = 8.0 if name.endswith("proj_mlp") else ALPHA
        expected[f"{name}.weight"] += SCALE * alpha / RANK * (up.astype(np.float64) @ down)
    found = tensors_of(merged)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert relative_error(value, expected[key]) <= 1e-6, key
    theirs = FluxTransformer2DModel.from_pretrained(home / "diffusers" / "transformer", low_cpu_mem_usage=False)
    weights = {key.removeprefix("transformer."): value for key, value in expected.items() if "transformer." in key[:12]}
    theirs.load_state_dict({key: torch.from_numpy(value).float() for key, value in weights.items()})
    theirs.save_pretrained(home / "fused" / "transformer")
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((6, 16), (5, 24), (16,))]
    record = record_transformer(home / "fused", TransformerInputs(*arrays, 0.75, 3.5, (2, 3)))
    inputs = Inputs(*map(jnp.asarray, arrays), jnp.float32(0.75), jnp.float32(3.5))
    assert relative_error(RUN(merged.transformer, inputs, (2, 3)), record.velocity) <= TOL.f32_run
    assert relative_error(RUN(before.transformer, inputs, (2, 3)), record.velocity) > 0.05


@pytest.mark.parametrize(("where", "dtype"), [("diffusers", jnp.float32), ("ours", jnp.bfloat16)])
def test_streamed_weights_have_the_bits_of_resident_ones(home, full, where, dtype):
    lora = [f"{full}:{SCALE}"]
    resident = load_pipeline(home / where, dtype=dtype, lora=lora)
    for weights in ("disk", "host"):
        streamed = load_pipeline(home / where, dtype=dtype, lora=lora, weights=weights)
        assert streamed.source == resident.source
        for part in ("transformer", "t5", "clip"):
            pairs = zip(*(jax.tree.leaves(whole(getattr(pipe, part))) for pipe in (streamed, resident)), strict=True)
            assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_some_columns_of_a_streamed_layer_are_those_of_the_whole(home, full):
    stack = load_pipeline(home / "ours", lora=[full], weights="disk").transformer.single
    some = np.array([5, 0, 7])
    part = stack.source.read(1, {"qkv.kernel": (1, some)})
    assert np.array_equal(part.qkv.kernel, stack.source.read(1).qkv.kernel[:, some])


def test_weights_that_are_spread_over_devices_are_changed_where_they_lie(home, full):
    mesh = make_mesh({"feature": 2}, jax.devices()[:2])
    spread = load_pipeline(home / "ours", lora=[full], sharding=pipeline_shardings(mesh))
    alone = load_pipeline(home / "ours", lora=[full])
    leaves = [jax.tree.leaves(pipe.transformer) for pipe in (spread, alone)]
    assert any(not leaf.sharding.is_fully_replicated for leaf in leaves[0])
    assert all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


def test_half_precision_rounds_once_however_many_loras_there_are(home):
    pipe = load_pipeline(home / "ours", dtype=jnp.bfloat16)
    name = "transformer.single_transformer_blocks.1.proj_mlp"
    made = [factors({name: matrices(pipe)[name]}, seed) for seed in (1, 2)]
    files = [save_diffusers(home / f"{seed}.safetensors", one) for seed, one in enumerate(made)]
    merged = load_pipeline(home / "ours", dtype=jnp.bfloat16, lora=[f"{files[0]}:2", files[1]])
    change = [factor * (up @ down) for factor, (down, up) in zip((2.0, 1.0), (one[name] for one in made), strict=True)]
    before = np.asarray(pipe.transformer.single.up.kernel[1])
    expected = (before.astype(np.float32) + (np.float32(1) * change[0] + change[1]).T).astype(ml_dtypes.bfloat16)
    assert np.array_equal(merged.transformer.single.up.kernel[1], expected)
    assert np.array_equal(merged.transformer.single.up.kernel[0], pipe.transformer.single.up.kernel[0])


ORIGINAL = {
    "double_blocks.1.img_attn.qkv": ["transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.to_k"]
    + ["transformer_blocks.1.attn.to_v"],
    "double_blocks.2.txt_attn.qkv": [f"transformer_blocks.2.attn.add_{one}_proj" for one in "qkv"],
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.txt_mlp.0": ["transformer_blocks.0.ff_context.net.0.proj"],
    "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
    "single_blocks.1.linear1": [f"single_transformer_blocks.1.attn.to_{one}" for one in "qkv"]
    + ["single_transformer_blocks.1.proj_mlp"],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "txt_in": ["context_embedder"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
"""Modules of the original release, and those of diffusers that they are made of."""
TEXT = {
    "text_model.encoder.layers.1.self_attn.q_proj": "text_encoder.text_model.encoder.layers.1.self_attn.q_proj",
    "encoder.block.0.layer.1.DenseReluDense.wi_0": "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wi_0",
}


@pytest.mark.parametrize("layout", ["kohya", "comfy", "peft"])
def test_other_layouts_are_diffusers(home, tmp_path, layout):
    shapes = {
        name.removeprefix("transformer."): shape for name, shape in matrices(load_pipeline(home / "ours")).items()
    }
    wide = {name: (sum(shapes[one][0] for one in parts), shapes[parts[0]][1]) for name, parts in ORIGINAL.items()}
    fused = factors(wide)
    split: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, parts in ORIGINAL.items():
        down, up = fused[name]
        ups = np.split(up, np.cumsum([shapes[one][0] for one in parts])[:-1])
        if name.startswith("final"):
            ups = [np.concatenate(np.split(up, 2)[::-1])]  # shift before scale, where diffusers has scale first
        split |= {f"transformer.{one}": (down, part) for one, part in zip(parts, ups, strict=True)}
    ours = load_pipeline(home / "ours")
    all_shapes = matrices(ours)
    text = factors(
        {other: all_shapes[other.replace("text_encoder.text_model.", "text_encoder.")] for other in TEXT.values()}, 3
    )
    if layout == "peft":  # of one model alone: the transformer
        text = {}
    told = {f"{folder}.lora_alpha": ALPHA for folder in FOLDERS}
    metadata = {"lora_adapter_metadata": json.dumps(told)}
    expected = load_pipeline(
        home / "ours", lora=[save_diffusers(tmp_path / "a.safetensors", split | text, metadata=metadata)]
    )
    tensors: dict[str, np.ndarray] = {}
    if layout == "kohya":
        texts = {f"lora_te{3 if 'Dense' in name else 1}_{name}": text[other] for name, other in TEXT.items()}
        for name, (down, up) in ({f"lora_unet_{name}": pair for name, pair in fused.items()} | texts).items():
            flat = name.replace(".", "_")
            tensors |= {
                f"{flat}.lora_down.weight": down,
                f"{flat}.lora_up.weight": up,
                f"{flat}.alpha": np.array(ALPHA, np.float32),
            }
    elif layout == "comfy":
        homes = {name: "t5xxl" if "Dense" in name else "clip_l" for name in TEXT}
        texts = {f"text_encoders.{homes[name]}.transformer.{name}": text[other] for name, other in TEXT.items()}
        for name, (down, up) in ({f"diffusion_model.{name}": pair for name, pair in fused.items()} | texts).items():
            tensors |= {
                f"{name}.lora_A.weight": down,
                f"{name}.lora_B.weight": up,
                f"{name}.alpha": np.array(ALPHA, np.float32),
            }
    file = tmp_path / "b.safetensors"
    if layout == "peft":
        # A rank-stabilised one: alpha is divided by the root of the rank.
        config = {"lora_alpha": ALPHA / RANK**0.5, "use_rslora": True, "r": RANK}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        file = save_diffusers(tmp_path / "adapter_model.safetensors", fused, prefix="base_model.model.").parent
    else:
        save_file(tensors, file)
    found = load_pipeline(home / "ours", lora=[file])
    for part in ("transformer", "clip", "t5"):
        for a, b in zip(*(jax.tree.leaves(getattr(pipe, part)) for pipe in (found, expected)), strict=True):
            assert relative_error(a, b) <= 1e-6
    assert relative_error(found.transformer.final.mod.kernel, ours.transformer.final.mod.kernel) > 0.01


def test_xlabs_layout_is_what_diffusers_makes_of_it(home, tmp_path):
    rng = np.random.default_rng(5)
    wide = {"double_blocks.1.processor.qkv_lora1": (96, 32), "double_blocks.0.processor.qkv_lora2": (96, 32)}
    wide |= {"double_blocks.2.processor.proj_lora1": (32, 32), "double_blocks.2.processor.proj_lora2": (32, 32)}
    wide |= {"single_blocks.1.processor.qkv_lora": (96, 32), "single_blocks.0.processor.proj_lora": (32, 160)}
    tensors = {
        f"{name}.{half}.weight": (0.3 * rng.standard_normal(shape)).astype(np.float32)
        for name, (outer, inner) in wide.items()
        for half, shape in (("down", (RANK, inner)), ("up", (outer, RANK)))
    }
    save_file(tensors, tmp_path / "xlabs.safetensors")
    theirs = _convert_xlabs_flux_lora_to_diffusers({key: torch.from_numpy(value) for key, value in tensors.items()})
    save_file({key: value.numpy().copy() for key, value in theirs.items()}, tmp_path / "diffusers.safetensors")
    found, expected = (
        load_pipeline(home / "ours", lora=[tmp_path / f"{one}.safetensors"]) for one in ("xlabs", "diffusers")
    )
    before = load_pipeline(home / "ours")
    changed = 0
    for a, b, c in zip(*(jax.tree.leaves(pipe.transformer) for pipe in (found, expected, before)), strict=True):
        assert relative_error(a, b) <= 1e-6
        changed += not np.array_equal(a, c)
    assert changed == 6 + 1  # proj_lora changes the columns of attention and of the MLP


def test_differences_are_added_as_they_are_wherever_the_weights_lie(home, tmp_path):
    """ComfyUI's `.diff` of a weight or a norm, `.diff_b` of a bias, in a row of the table that makes weights too."""
    rng = np.random.default_rng(6)
    made = {
        "diffusion_model.double_blocks.1.txt_attn.proj.diff": (32, 32),
        "diffusion_model.double_blocks.1.txt_attn.proj.diff_b": (32,),
        "diffusion_model.single_blocks.1.linear1.diff_b": (96 + 128,),
        "diffusion_model.single_blocks.0.norm.query_norm.scale.diff": (16,),
        "diffusion_model.final_layer.adaLN_modulation.1.diff_b": (64,),
    }
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in made.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    before, after = (
        load_pipeline(home / "ours"),
        load_pipeline(home / "ours", lora=[f"{tmp_path / 'x.safetensors'}:0.5"]),
    )
    weight, bias, linear, norm, final = (0.5 * value for value in tensors.values())
    double, single, other = after.transformer.double, after.transformer.single, before.transformer
    expected = (
        (double.txt.attn.proj.kernel[1], other.double.txt.attn.proj.kernel[1] + weight.T),
        (double.txt.attn.proj.bias[1], other.double.txt.attn.proj.bias[1] + bias),
        (single.qkv.bias[1], other.single.qkv.bias[1] + linear[:96]),
        (single.up.bias[1], other.single.up.bias[1] + linear[96:]),
        (single.q_norm.scale[0], other.single.q_norm.scale[0] + norm),
        (after.transformer.final.mod.bias, other.final.mod.bias + final),
    )
    assert all(relative_error(found, wanted) <= 1e-6 for found, wanted in expected)
    differing = [
        not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (after.transformer, other)), strict=True)
    ]
    assert sum(differing) == len(expected)
    streamed = load_pipeline(home / "ours", lora=[f"{tmp_path / 'x.safetensors'}:0.5"], weights="disk")
    pairs = zip(*(jax.tree.leaves(whole(pipe.transformer)) for pipe in (streamed, after)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_a_pipeline_says_what_was_merged_and_keeps_it_when_saved(home, full, tmp_path):
    base = load_pipeline(home / "ours")
    merged = load_pipeline(home / "ours", lora=[f"{full}:0.5"])
    other = load_pipeline(home / "ours", lora=[f"{full}:0.25"])
    assert len({base.source, merged.source, other.source}) == 3 and merged.base == other.base == base.source
    assert [(one.name, one.scale) for one in merged.loras] == [("full.safetensors", 0.5)]
    assert "full.safetensors:0.5 (sha256 " in repr(merged)
    save_pipeline(merged, tmp_path / "saved")
    again = load_pipeline(tmp_path / "saved")
    assert (again.base, again.loras) == (merged.base, merged.loras)
    pairs = zip(jax.tree.leaves(again.transformer), jax.tree.leaves(merged.transformer), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16], ids=["f32", "bf16"]
)
def test_a_conversion_merges_what_a_load_merges_byte_for_byte(home, full, tmp_path, dtype):
    lora = [f"{full}:{SCALE}"]
    save_pipeline(load_pipeline(home / "diffusers", dtype=dtype, lora=lora), tmp_path / "saved")
    made = convert_model(home / "diffusers", tmp_path / "made", dtype=dtype, lora=lora)
    assert [(one.name, one.scale) for one in made.loras] == [("full.safetensors", SCALE)]
    for file in (tmp_path / "saved").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "made" / file.relative_to(tmp_path / "saved")).read_bytes(), file.name
    alone = convert_model(home / "diffusers" / "transformer", tmp_path / "alone", lora=[save_style(tmp_path, home)])
    assert json.loads((alone.path / "config.json").read_text())["loras"][0]["name"] == "style.safetensors"


def save_style(folder: Path, home: Path) -> Path:
    """A LoRA of one matrix of the transformer."""
    name = "transformer.single_transformer_blocks.1.proj_mlp"
    return save_diffusers(folder / "style.safetensors", factors({name: matrices(load_pipeline(home / "ours"))[name]}))


def test_a_conversion_with_a_lora_of_another_model_writes_nothing(home, tmp_path, monkeypatch, capsys):
    tensors, told = WRONG["another base by its sizes"]
    save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.chdir(tmp_path)
    found = run_command(monkeypatch, capsys, "convert", "flux", home / "diffusers", "out", "--lora", "x.safetensors")
    assert found.status == 1 and re.search(told, found.err) and "\n" not in found.err.strip()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors"]


def test_a_scale_stands_behind_the_last_colon():
    assert parse_lora("a.safetensors:-0.5") == ("a.safetensors", -0.5)
    assert parse_lora("hf:someone/style@v1/a.safetensors:2") == ("hf:someone/style@v1/a.safetensors", 2.0)
    assert parse_lora("a.safetensors:0.5/b") == ("a.safetensors:0.5/b", 1.0)
    with pytest.raises(
        UserError, match=r"scale of a LoRA is a number, as in a\.safetensors:0\.8, but .* ends in 'nan'"
    ):
        parse_lora("a.safetensors:nan")


ONE = "transformer.single_transformer_blocks.0.attn.to_q"
A, B = np.zeros((RANK, 32), np.float32), np.zeros((32, RANK), np.float32)
GOOD = {f"{ONE}.lora_A.weight": A, f"{ONE}.lora_B.weight": B}
SDXL = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
WRONG = {
    "another base by its modules": (
        {f"{SDXL}.lora_down.weight": A, f"{SDXL}.lora_up.weight": B},
        "is a LoRA of another model, Stable Diffusion 1, 2 or XL: none of its 1 modules can be found in FLUX.1, which "
        f"has no {SDXL};",
    ),
    "more blocks than there are": (
        GOOD | {key.replace("blocks.0", "blocks.9"): value for key, value in GOOD.items()},
        "is a LoRA of another model: only 1 of its 2 modules can be found in FLUX.1, which has no transformer.single",
    ),
    "another base by its sizes": (
        {f"{ONE}.lora_A.weight": np.zeros((4, 48), np.float32), f"{ONE}.lora_B.weight": np.zeros((48, 4), np.float32)},
        rf"it changes {ONE} of shape \(48, 48\), but FLUX.1's is \(32, 32\)",
    ),
    "ranks that differ": (GOOD | {f"{ONE}.lora_B.weight": B[:, :2]}, "that do not multiply: .* have no rank in common"),
    "half a module": ({f"{ONE}.lora_A.weight": A}, f"holds {ONE}.lora_A.weight without its other factor"),
    "infinity": (GOOD | {f"{ONE}.lora_A.weight": A + np.inf}, f"values that are not finite in {ONE}.lora_A.weight"),
    "an infinite alpha": (
        GOOD | {f"{ONE}.alpha": np.array(np.inf, np.float32)},
        rf"that are not finite in {ONE}\.alpha",
    ),
    "DoRA": (GOOD | {f"{ONE}.dora_scale": B}, "holds the magnitudes of a DoRA .* only plain LoRAs of matrices"),
    "LoKr": ({f"{ONE}.lokr_w1": A}, "is no LoRA|holds factors of a LoKr"),
    "half a module of XLabs": (
        {"double_blocks.0.processor.qkv_lora1.down.weight": A},
        "holds double_blocks.0.processor.qkv_lora1.down.weight without its other factor",
    ),
    "q, k and v of no common width": (
        {
            "single_blocks.0.processor.qkv_lora.down.weight": A,
            "single_blocks.0.processor.qkv_lora.up.weight": B[:31],
        },
        "for 31 channels, which are not q, k and v of one width",
    ),
    "an image adapter": (
        GOOD | {"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": A},
        "image adapter",
    ),
    "another base by a bias": (
        GOOD | {f"{ONE}.diff_b": A[0, :5]},
        rf"it changes {ONE}\.bias of shape \(5,\), but FLUX.1's is \(32,\)",
    ),
    "an infinite difference": (GOOD | {f"{ONE}.diff": np.full((32, 32), np.inf)}, rf"not finite in {ONE}\.diff;"),
    "factors with biases": (GOOD | {f"{ONE}.lora_B.bias": A[0]}, "holds factors with biases"),
    "weights to be set": (GOOD | {f"{ONE}.set_weight": A[0]}, "weights that replace those of the model"),
    "something else": (GOOD | {"bundle_emb.token": A}, "holds bundle_emb.token, which belongs to no LoRA"),
    "no LoRA": ({"weight": A}, r"is no LoRA: none of its keys ends in lora_A.weight or lora_down.weight \(they begin"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_in_a_sentence_before_weights_are_read(home, tmp_path, monkeypatch, name):
    tensors, told = WRONG[name]
    save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr("difffract_jax.loading._load", lambda *names, **options: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=told) as caught:
        load_pipeline(home / "ours", lora=[tmp_path / "x.safetensors"])
    assert "x.safetensors" in str(caught.value) and str(caught.value).count(". ") == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (b'{"lora_alpha": "\xff"}', "has settings that are not valid JSON"),
        (b'{"lora_alpha": "much"}', f"settings that give {ONE} an alpha that is not a number"),
        (b'{"lora_alpha": 1, "alpha_pattern": {"(": 1}}', f"settings that give {ONE} an alpha that is not a number"),
    ],
)
def test_settings_that_give_no_alpha_are_refused_in_a_sentence(tmp_path, settings, told):
    save_file(GOOD, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(settings)
    with pytest.raises(UserError, match=told):
        read_lora(tmp_path)


def test_a_lora_of_another_model_is_refused_before_a_transformer_and_its_base_are_read(home, tmp_path, monkeypatch):
    tensors, told = WRONG["another base by its sizes"]
    save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr("difffract_jax.loading._load", lambda *names, **options: pytest.fail("weights were read"))
    alone = home / "diffusers" / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=told):
        load_pipeline(alone, base=home / "diffusers", lora=[tmp_path / "x.safetensors"])


def test_a_file_that_is_not_there_or_a_whole_model_is_named(home):
    with pytest.raises(UserError, match=r"There is no LoRA .*gone\.safetensors; give a \.safetensors file"):
        load_pipeline(home / "ours", lora=["gone.safetensors:0.5"])
    whole_model = home / "diffusers" / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="is a whole model, which is given as MODEL"):
        load_pipeline(home / "ours", lora=[whole_model])
