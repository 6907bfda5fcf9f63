"""Models and transcoders by path: saved and loaded alike, and every wrong path refused with what to do."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.flux import FLUX_SINGLE_FILE
from converters.mapping import save_tree
from difffract_jax.config import UserError
from difffract_jax.conversion import convert_flux
from difffract_jax.directories import Directory, is_whole_pipeline
from difffract_jax.loading import (
    load_pipeline,
    load_transcoders,
    save_pipeline,
    save_transcoders,
)
from difffract_jax.models.mmdit import MMDiT
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.tokenizers import encode_prompt
from difffract_jax.parts import dtype_of_files, identity
from difffract_jax.sharding import make_mesh, pipeline_shardings
from difffract_jax.storage.checkpoint import load_tree
from difffract_jax.storage.sums import sample_hash
from difffract_jax.transcoders.sites import sites_of
from tolerances import REFERENCE

PIPELINE, TRANSCODERS = REFERENCE / "pipeline", REFERENCE / "transcoders"


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(PIPELINE)


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("saved") / "flux"
    save_pipeline(pipe, out)
    return out


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture(scope="module")
def tcs():
    return load_transcoders(TRANSCODERS)


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)


def test_a_saved_pipeline_is_the_converted_one(pipe, saved):
    loaded = load_pipeline(saved)
    assert loaded.config == pipe.config
    assert loaded.source == pipe.source == json.loads((saved / "config.json").read_text())["content_hash"]
    assert_equal(loaded[:4], pipe[:4])
    for prompt in ("a red fox at dawn, oil painting", "", "héllo  Wörld"):
        ours, theirs = (encode_prompt(p.tokenizers, prompt, 12) for p in (loaded, pipe))
        assert all(np.array_equal(x, y) for x, y in zip(ours[:3], theirs[:3], strict=True))


def test_large_weights_are_identified_by_samples_of_their_files(pipe, monkeypatch):
    monkeypatch.setattr("difffract_jax.parts.VERIFY_BELOW_BYTES", 1000)
    sample, parts = sample_hash(PIPELINE), {"transformer": pipe.transformer}
    assert identity(parts, Directory(PIPELINE)) == f"sampled:{sample}"
    assert identity(parts, Directory(PIPELINE), variant="fp16") == f"sampled:{sample}:fp16"
    vae = PIPELINE / "vae" / "diffusion_pytorch_model.safetensors"
    assert identity(parts, Directory(vae), base=Directory(PIPELINE)) == f"sampled:{sample_hash(vae)}:{sample}"


def test_a_pipeline_loads_in_the_type_that_is_asked_for(saved):
    half = load_pipeline(saved, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half[:4])} == {jnp.bfloat16.dtype}


def test_a_transformer_is_spread_over_a_mesh(saved, pipe):
    sharding = pipeline_shardings(make_mesh({"feature": 2}))
    for source in (saved, PIPELINE):
        spread = load_pipeline(source, sharding=sharding)
        assert not spread.transformer.single.up.kernel.sharding.is_fully_replicated
        assert spread.t5.final_norm.scale.sharding.is_fully_replicated
        assert spread.vae.decoder.conv_in.kernel.sharding.is_fully_replicated
        assert_equal(spread[:4], pipe[:4])


@pytest.mark.parametrize(("kind", "expected"), [(ml_dtypes.bfloat16, jnp.bfloat16), (np.float32, jnp.float32)])
def test_weights_keep_the_type_of_the_transformer_s_file(tmp_path, kind, expected):
    (tmp_path / "diffusers" / "transformer").mkdir(parents=True)
    (tmp_path / "diffusers" / "model_index.json").write_text("{}", encoding="utf-8")
    save_file({"x": np.ones(9, kind)}, tmp_path / "flux1.safetensors")
    save_file({"y": np.ones(1, np.float32)}, tmp_path / "ae.safetensors")
    save_file({"x": np.ones(9, kind)}, tmp_path / "diffusers" / "transformer" / "model.safetensors")
    for path in (tmp_path, tmp_path / "flux1.safetensors", tmp_path / "diffusers"):
        assert dtype_of_files(path) == expected


def test_a_single_file_alone_is_a_transformer_and_says_so(pipe, tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    file = tmp_path / "files" / "flux.safetensors"
    save_file({key: np.ascontiguousarray(value) for key, value in save_tree(pipe.transformer, FLUX_SINGLE_FILE)}, file)
    save_file({"decoder.conv_in.weight": np.ones(2)}, tmp_path / "files" / "ae.safetensors")
    with pytest.raises(UserError, match="transformer is one part of the pipeline .*; give that directory"):
        load_pipeline(PIPELINE / "transformer")
    for path in (file, file.parent):
        with pytest.raises(UserError, match=r"is a transformer alone; .* convert flux .* --base DIR"):
            load_pipeline(path)
    with pytest.raises(UserError, match="is an autoencoder"):
        load_pipeline(tmp_path / "files" / "ae.safetensors")
    for path in (file, file.parent):
        direct = load_pipeline(path, base=PIPELINE)
        assert direct.source == pipe.source
        assert_equal(direct[:4], pipe[:4])
    convert_flux(file, tmp_path / "full", base=PIPELINE)
    assert_equal(load_pipeline(tmp_path / "full")[:4], pipe[:4])
    monkeypatch.setattr("converters.pipelines.ROPE_AXES", pipe.config.transformer.rope_axes)
    for number, path in enumerate((file, file.parent, PIPELINE / "transformer")):
        alone = convert_flux(path, tmp_path / f"alone{number}")
        assert alone.config == pipe.config.transformer and list(alone.parameters) == ["transformer"]
        abstract = abstract_module(MMDiT, alone.config)
        assert_equal(load_tree(alone.path, abstract, name="transformer", verify=True), pipe.transformer)
    with pytest.raises(UserError, match="holds a transformer alone; convert the single file again with --base DIR"):
        load_pipeline(tmp_path / "alone0")
    with pytest.raises(UserError, match="--base completes a transformer"):
        convert_flux(PIPELINE, tmp_path / "never", base=PIPELINE)
    with pytest.raises(UserError, match="--base completes a transformer"):
        load_pipeline(PIPELINE, base=PIPELINE)
    with pytest.raises(UserError, match="its weights have no variants; leave --variant out"):
        load_pipeline(tmp_path / "full", variant="fp16")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere/at/all", "nowhere/at/all is not a directory; give one that difffract or diffusers wrote, a repo"),
        ("nowhere", r"nowhere is not a directory; .* embedded: organism, organism-sd3, organism-flux2\.$"),
        ("organsim", r"organsim is not a directory, and nothing embedded has that name; did you mean `organism`\?$"),
        ("organism-sd4", r"did you mean `organism-sd3`\?$"),
        ("organism-flux", r"did you mean `organism-flux2`\?$"),
        (TRANSCODERS, "holds no config.json"),
        (PIPELINE / "vae", "names no format_version"),
    ],
)
def test_what_is_no_model_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        load_pipeline(model)


def test_a_mistyped_name_is_told_wherever_something_embedded_is_taken(tmp_path):
    with pytest.raises(UserError, match="did you mean `organism-saes`"):
        load_transcoders("organism-sae")
    with pytest.raises(UserError, match="did you mean `organism`"):
        load_pipeline(PIPELINE / "transformer", base="organsim")
    with pytest.raises(UserError, match="did you mean `organism`"):
        convert_flux("organsim", tmp_path / "out")
    assert not is_whole_pipeline("organism-saes")  # as `evaluate organism-saes organism` asks first
    with pytest.raises(UserError, match=r"organsim\.safetensors does not exist"):
        convert_flux("organsim.safetensors", tmp_path / "out")


def test_the_embedded_model_is_known_as_base_and_as_whole():
    with pytest.raises(UserError, match="--base completes a transformer, but organism is a directory with all parts"):
        load_pipeline("organism", base=PIPELINE)
    with pytest.raises(UserError, match="do not fit one another"):
        load_pipeline(PIPELINE / "transformer", base="organism")


def test_a_model_and_transcoders_are_not_confused(saved, tcs, tmp_path):
    save_transcoders(tcs, tmp_path / "tcs")
    with pytest.raises(UserError, match="holds transcoders, but pipeline is wanted"):
        load_pipeline(tmp_path / "tcs")
    with pytest.raises(UserError, match="holds pipeline, but transcoders is wanted"):
        load_transcoders(saved)


def test_a_damaged_copy_is_refused_by_name(copy):
    weights = copy / "vae.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3])
    with pytest.raises(UserError, match=r"vae.safetensors \(by 3 bytes\)"):
        load_pipeline(copy)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="differ from their recorded hash"):
        load_pipeline(copy)
    weights.unlink()
    with pytest.raises(UserError, match="lacks vae.safetensors"):
        load_pipeline(copy)


def test_a_configuration_that_does_not_fit_is_refused(copy):
    path = copy / "config.json"
    record = json.loads(path.read_text())
    extra = json.loads(path.read_text())
    extra["config"]["vae"]["colour"] = 1
    path.write_text(json.dumps(extra))
    with pytest.raises(UserError, match="does not fit AutoencoderConfig"):
        load_pipeline(copy)
    path.write_text(json.dumps(record | {"config": record["config"] | {"vae": 5}}))
    with pytest.raises(UserError, match="has 5 in place of the values of AutoencoderConfig"):
        load_pipeline(copy)
    path.write_text(json.dumps(record | {"config": None}))
    with pytest.raises(UserError, match="does not describe the parts"):
        load_pipeline(copy)
    del record["config"]["vae"]
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="does not describe the parts transformer, t5, clip, vae"):
        load_pipeline(copy)


@pytest.mark.parametrize("name", ["transcoders", "saes"])
def test_saved_transcoders_are_the_converted_ones(tmp_path, name):
    tcs = load_transcoders(REFERENCE / name)
    save_transcoders(tcs, tmp_path / "out")
    loaded = load_transcoders(tmp_path / "out")
    assert loaded._replace(stacks={}) == tcs._replace(stacks={})
    assert_equal(loaded.stacks, tcs.stacks)
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["layers"]
    assert list(layers) == ["img", "txt", "joint"] and layers["joint"] == []


def test_one_stream_alone_is_saved_and_loaded(tmp_path, tcs):
    alone = {"img": tcs.sites.groups["img"]}
    save_transcoders(tcs._replace(stacks={"img": tcs.stacks["img"]}, sites=sites_of(alone)), tmp_path / "out")
    loaded = load_transcoders(tmp_path / "out")
    assert list(loaded.stacks) == ["img"] and loaded.sites.groups == alone
