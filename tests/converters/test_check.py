"""`convert check` finds nothing where nothing is wrong, and names the one block that is."""

import jax
import pytest
from zimage import tiny_pipeline as tiny_zimage

from chroma import tiny_pipeline as tiny_chroma
from converters.check import check
from converters.export import export_pipeline
from difffract_jax.config import UserError
from difffract_jax.loading import load_pipeline
from difffract_jax.models.mmdit import FluxConfig
from difffract_jax.models.tiny import TINY, random_pipeline
from klein import tiny_pipeline
from sd3 import tiny_pipeline as tiny_sd3
from tolerances import REFERENCE, TOL

PIPELINE = REFERENCE / "pipeline"


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(PIPELINE)


def test_every_part_of_a_converted_pipeline_is_pytorch_s(pipe):
    rows = check(PIPELINE, pipe, tolerance=TOL.f32_block)
    blocks = ["double 0", "double 1", "double 2", "single 0", "single 1"]
    assert [row.part for row in rows] == ["t5", "clip", "embeddings", *blocks, "whole transformer", "autoencoder"]
    assert all(row.equal and 0 < row.error <= row.bar for row in rows)


def test_a_model_with_guidance_is_checked_too(tmp_path):
    pipe = random_pipeline(transformer=FluxConfig(**(vars(TINY) | {"guidance": True})))
    export_pipeline(pipe, tmp_path / "dev")
    blocks = [row for row in check(tmp_path / "dev", pipe) if row.part.startswith(("double", "single", "whole"))]
    assert len(blocks) == 6 and all(row.equal for row in blocks)


def test_the_one_wrong_block_is_named(pipe):
    kernel = pipe.transformer.double.txt.mlp.up.kernel
    spoilt = jax.tree.map(lambda leaf: leaf, pipe.transformer)
    spoilt.double.txt.mlp.up.kernel[...] = kernel[...].at[1, 0].add(0.1)
    rows = check(PIPELINE, pipe._replace(transformer=spoilt))
    assert [row.part for row in rows if not row.equal] == ["double 1", "whole transformer"]


def test_what_cannot_be_compared_is_refused(pipe, tmp_path):
    with pytest.raises(UserError, match="is not a diffusers directory; give the one that the pipeline was"):
        check(tmp_path, pipe)
    with pytest.raises(UserError, match="have different shapes in: transformer, t5, clip, vae"):
        check(PIPELINE, random_pipeline())


@pytest.mark.slow
def test_every_part_of_klein_is_pytorch_s_and_a_wrong_block_is_named(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "klein")
    pipe = load_pipeline(tmp_path / "klein")
    rows = check(tmp_path / "klein", pipe, tolerance=TOL.f32_block)
    blocks = ["double 0", "double 1", "single 0", "single 1"]
    assert [row.part for row in rows] == ["qwen3", "embeddings", *blocks, "whole transformer", "autoencoder"]
    assert all(row.equal and 0 < row.error <= row.bar for row in rows)
    pipe.transformer.single.gate.kernel[...] = pipe.transformer.single.gate.kernel[...].at[1, 0].add(0.1)
    rows = check(tmp_path / "klein", pipe)
    assert [row.part for row in rows if not row.equal] == ["single 1", "whole transformer"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "t5", "first"),
    [("sd3.5-medium", True, ["dual 0", "double 0"]), ("sd3-medium", False, ["double 0", "double 1"])],
)
def test_every_part_of_sd3_is_pytorch_s_and_a_wrong_block_is_named(tmp_path, name, t5, first):
    tiny_sd3(name, t5=t5).save_pretrained(tmp_path / "sd3")
    pipe = load_pipeline(tmp_path / "sd3")
    rows = check(tmp_path / "sd3", pipe, tolerance=TOL.f32_block)
    encoders = [*(["t5"] if t5 else []), "clip", "clip 2"]
    assert [row.part for row in rows] == [*encoders, "embeddings", *first, "last 0", "whole transformer", "autoencoder"]
    assert all(row.equal and 0 < row.error <= row.bar for row in rows)
    kernel = pipe.transformer.last.img.mlp.up.kernel
    kernel[...] = kernel[...].at[0, 0].add(0.1)
    pipe.clip.second.projection.kernel[...] = pipe.clip.second.projection.kernel[...] * 1.01
    rows = check(tmp_path / "sd3", pipe)
    assert [row.part for row in rows if not row.equal] == ["clip 2", "last 0", "whole transformer"]


def test_every_part_of_chroma_is_pytorch_s_and_what_is_wrong_is_named(tmp_path):
    tiny_chroma(use_beta_sigmas=True).save_pretrained(tmp_path / "chroma")
    pipe = load_pipeline(tmp_path / "chroma")
    rows = check(tmp_path / "chroma", pipe, tolerance=TOL.f32_block)
    blocks = ["double 0", "double 1", "single 0", "single 1"]
    assert [row.part for row in rows] == ["t5", "embeddings", *blocks, "whole transformer", "autoencoder"]
    assert all(row.equal and 0 < row.error <= row.bar for row in rows)
    kernel = pipe.transformer.single.up.kernel
    kernel[...] = kernel[...].at[1, 0].add(0.1)
    rows = check(tmp_path / "chroma", pipe)
    assert [row.part for row in rows if not row.equal] == ["single 1", "whole transformer"]
    # Every block gets PyTorch's modulations, so that a wrong modulator is not the blocks' fault.
    kernel[...] = kernel[...].at[1, 0].add(-0.1)
    outputs = pipe.transformer.modulator.outputs.kernel
    outputs[...] = 1.1 * outputs[...]
    rows = check(tmp_path / "chroma", pipe)
    assert [row.part for row in rows if not row.equal] == ["embeddings", "whole transformer"]


def test_every_part_of_zimage_is_pytorch_s_and_what_is_wrong_is_named(tmp_path):
    tiny_zimage().save_pretrained(tmp_path / "zimage")
    pipe = load_pipeline(tmp_path / "zimage")
    rows = check(tmp_path / "zimage", pipe, tolerance=TOL.f32_block)
    blocks = [f"{stack} {number}" for stack in ("refine_img", "refine_txt", "trunk") for number in range(2)]
    assert [row.part for row in rows] == ["qwen3", "embeddings", *blocks, "whole transformer", "autoencoder"]
    assert all(row.equal and 0 < row.error <= row.bar for row in rows)
    scale = pipe.transformer.refine_txt.behind_mlp.scale
    scale[...] = scale[...].at[1].multiply(1.1)
    rows = check(tmp_path / "zimage", pipe)
    assert [row.part for row in rows if not row.equal] == ["refine_txt 1", "whole transformer"]
