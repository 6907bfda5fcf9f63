"""Siblings of the organism: the same world in Stable Diffusion 3's and FLUX.2's architectures.

A tiny run of each is trained once: a handful of steps with no image stage, since they begin with the organism's.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.loading import load_pipeline, save_pipeline
from difffract_jax.models.flux2 import Flux2MMDiT
from difffract_jax.models.mmdit import Inputs, time_channels
from difffract_jax.models.pipeline import encode, generate
from difffract_jax.models.tokenizers import encode_prompt, load_tokenizers
from difffract_jax.organism import card, flow, pool, text
from difffract_jax.organism.architectures import ARCHITECTURES
from difffract_jax.organism.beginnings import position_table
from difffract_jax.organism.evaluate import ablations
from difffract_jax.organism.probe import probe_binding, replace_text
from difffract_jax.organism.recipe import OrganismRecipe
from difffract_jax.organism.train import _flow_stage, train
from difffract_jax.organism.vocabulary import WORDS, is_of_the_world, make_tokenizers, reads_world, word_starts
from difffract_jax.organism.world import scenes
from difffract_jax.storage.checkpoint import leaf_paths
from tolerances import TOL, relative_error

SIBLINGS = ("sd3", "flux2")
FLOW = {
    "sd3": {"depth_double": 2, "depth_single": 0, "dropped": 0.5},
    "flux2": {"depth_double": 1, "depth_single": 1},
}


def recipe_of(arch, **more):
    flow = {"steps": 10, "heads": 1, "batch": 8, "pool": 32, "warm_up": 2} | FLOW[arch] | more
    return OrganismRecipe(arch=arch, text={"steps": 6, "batch": 8}, flow=flow, save_every=20)


@pytest.fixture(scope="module")
def organism_itself():
    return load_pipeline("organism")


@pytest.fixture(scope="module", params=["sd3", pytest.param("flux2", marks=pytest.mark.slow)])
def sibling(request, organism_itself, tmp_path_factory):
    """Name, directory of the run, and pipeline."""
    directory = tmp_path_factory.mktemp(request.param) / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "AT_ONCE", 16)
        return request.param, directory, train(recipe_of(request.param), directory, begin=organism_itself)


@pytest.fixture(scope="module", params=SIBLINGS)
def shipped(request):
    """The sibling of each architecture that ships."""
    return load_pipeline(f"organism-{request.param}")


def test_the_result_is_a_pipeline_that_is_saved_loaded_and_draws(sibling, tmp_path):
    _, _, pipe = sibling
    save_pipeline(pipe, tmp_path / "pipeline")
    loaded = load_pipeline(tmp_path / "pipeline")
    assert loaded.config == pipe.config and reads_world(loaded.tokenizers)
    assert is_of_the_world(str(tmp_path / "pipeline")) and not is_of_the_world(str(tmp_path))
    ours, theirs = (generate(one, "a red circle left of a blue square", seed=1).image for one in (pipe, loaded))
    assert ours.shape == (48, 48, 3) and np.ptp(ours) > 0
    np.testing.assert_array_equal(ours, theirs)


def test_what_it_shares_with_the_organism_stays_as_it_is_there(sibling, organism_itself):
    arch, directory, pipe = sibling
    theirs = leaf_paths(organism_itself.vae)
    ours = {name: leaf for name, leaf in leaf_paths(pipe.vae).items() if not name.startswith("latents.")}
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(leaf, theirs[name]) for name, leaf in ours.items())
    if arch == "sd3":
        for one, other in ((pipe.t5, organism_itself.t5), (pipe.clip.first.text, organism_itself.clip)):
            other = leaf_paths(other)
            assert all(np.array_equal(leaf, other[name]) for name, leaf in leaf_paths(one).items())
        assert np.array_equal(pipe.clip.first.projection.kernel[...], np.eye(64))
    assert not (directory / "images").exists()


def test_many_captions_are_encoded_as_one_is(shipped):
    captions = (*scenes(3, 0, 4).captions, "", " ".join(WORDS[:19]))
    many = text.tokenise(shipped.tokenizers, captions)
    states, pooled = text.encode_all(shipped.t5, shipped.clip, many)
    length = shipped.config.defaults.text_tokens
    for row, caption in enumerate(captions):
        ids = encode_prompt(shipped.tokenizers, caption, length)
        np.testing.assert_array_equal(many.t5_ids[row], ids.t5_ids)
        np.testing.assert_array_equal(many.clip_ids[row], ids.clip_ids)
        one = encode(shipped, caption, length)
        assert one.cut == "" and relative_error(states[row], one.text) <= TOL.f32_block
        assert not pooled.shape[1] or relative_error(pooled[row], one.pooled) <= TOL.f32_block


def test_words_stand_where_they_are_said_to_begin(shipped):
    length = shipped.config.defaults.text_tokens
    pieces = shipped.tokenizers.pieces(encode_prompt(shipped.tokenizers, "a red circle", length).t5_ids)
    for start in word_starts(shipped.tokenizers):
        assert [piece.strip("\u2581") for piece in pieces[start : start + 3]] == ["a", "red", "circle"]


def test_a_word_that_the_vocabulary_lacks_is_refused(shipped):
    with pytest.raises(UserError, match="lacks `cirkle`; did you mean `circle`"):
        generate(shipped, "a red cirkle")
    same = (encode_prompt(shipped.tokenizers, prompt, 60).t5_ids for prompt in ("A red circle.", "a red circle"))
    np.testing.assert_array_equal(*same)


def test_latents_of_the_pool_are_those_that_the_decoder_unpacks(shipped):
    images = scenes(9, 0, 4).images()
    means = pool.encode_images(shipped.vae, images)
    tokens = pool._scaled(shipped.vae, means)
    assert np.std(tokens) == pytest.approx(1, rel=0.3)  # a few scenes, of one over all
    back = jax.vmap(lambda one: shipped.vae.unpacked(one, flow.GRID))(jnp.asarray(tokens))
    assert relative_error(back, means) <= TOL.f32_block


@pytest.mark.slow
def test_a_share_of_captions_is_dropped(sibling, organism_itself):
    _, _, pipe = sibling
    parts = pipe.vae, pipe.t5, pipe.clip, pipe.tokenizers, 5, 128
    kept, some, none = (pool.build_pool(*parts, dropped=share) for share in (0.0, 0.25, 0.999))
    empty = encode(pipe, "", pipe.config.defaults.text_tokens).text
    dropped = [float((np.abs(one.text - empty).max(axis=(1, 2)) < 1e-4).mean()) for one in (kept, some, none)]
    assert dropped[0] == 0 and 0.1 < dropped[1] < 0.4 and dropped[2] > 0.95
    np.testing.assert_array_equal(kept.latents, some.latents)


@pytest.mark.parametrize("arch", SIBLINGS)
def test_training_begins_with_plain_blocks_and_a_velocity_of_zero(arch):
    model = _flow_stage(recipe_of(arch), lambda: None).init().model
    rng, shape = np.random.default_rng(0), model.config
    made = (rng.standard_normal(size).astype(np.float32) for size in ((36, 32), (9, shape.text_width)))
    inputs = Inputs(*map(jnp.asarray, made), jnp.ones(shape.pooled_width), jnp.asarray(0.4))
    assert not np.any(model(inputs, flow.GRID))
    if isinstance(model, Flux2MMDiT):
        mods = model.shared(model.time_in(time_channels(inputs.t, jnp.float32)))
        gates = [mods.double.img[2], mods.double.img[5], mods.double.txt[2], mods.double.txt[5], mods.single[2]]
        assert np.abs(np.array(gates) - 1).max() < 0.1 and np.abs(np.asarray(mods.double.img[0])).max() < 0.5


@pytest.mark.parametrize("grid", [(6, 6), (2, 5)])
def test_positions_are_those_of_diffusers(grid):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    theirs = np.asarray(get_2d_sincos_pos_embed(64, 8, base_size=8, output_type="np")).reshape(8, 8, 64)
    np.testing.assert_allclose(position_table(8, 64)[: grid[0], : grid[1]], theirs[: grid[0], : grid[1]], atol=1e-6)


def test_positions_are_not_trained(sibling):
    arch, _, pipe = sibling
    if arch == "sd3":
        assert np.array_equal(pipe.transformer.positions[...], position_table(8, 32))


@pytest.mark.slow
def test_measures_run_and_the_card_tells_them(sibling, tmp_path):
    arch, _, pipe = sibling
    rows = ablations(pipe, 4)
    layout = pipe.config.transformer.layout
    assert len(rows) == sum(len(blocks) for blocks in layout.labels.values()) + (arch == "sd3")
    named = {row["what"] for row in probe_binding(pipe, 16)}
    assert {"txt entering", f"txt after {layout.block_name(0)}"} < named
    assert [row["images"] for row in replace_text(pipe, 4)] == [4, 4]
    written = card._text(pipe, recipe_of(arch), {}, "difffract organism train", 1.0)
    assert card.ABOUT[arch].title in written and "those of the pipeline `organism`" in written


def test_a_recipe_of_the_organism_is_what_it_was():
    dumped = OrganismRecipe().model_dump(mode="json")
    assert list(dumped) == ["seed", "text", "images", "flow", "save_every"] and "dropped" not in dumped["flow"]
    assert OrganismRecipe.model_validate(dumped) == OrganismRecipe()


@pytest.mark.parametrize("arch", SIBLINGS)
def test_a_run_of_another_recipe_is_not_resumed(arch, tmp_path, organism_itself):
    (tmp_path / "recipe.json").write_text(json.dumps(recipe_of(arch).model_dump(mode="json")))
    with pytest.raises(UserError, match=r"other values of flow\.dropped; resume"):
        train(recipe_of(arch, dropped=0.0 if arch == "sd3" else 0.2), tmp_path, resume=True, begin=organism_itself)
    with pytest.raises(UserError, match=r"other values of .*arch"):
        train(OrganismRecipe(), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"arch": "sd3", "flow": {"depth_single": 1}}, "has no single-stream blocks"),
        ({"arch": "sd3", "flow": {"depth_double": 1}}, "at least 2 double-stream ones"),
        ({"flow": {"depth_single": 0}}, "FLUX has at least 1 single-stream block"),
        ({"arch": "sd4"}, "sd3"),
    ],
)
def test_shapes_that_an_architecture_lacks_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        OrganismRecipe.model_validate(given)


def test_encoders_of_another_shape_are_not_taken(organism_itself):
    made = make_tokenizers()
    state = text.init(recipe_of("sd3").text, made, 0, ARCHITECTURES["sd3"].encoders(made))
    with pytest.raises(UserError, match="name another pipeline in `begin`"):
        text.with_taken(state, organism_itself.t5, state.clip.second.text)


def test_only_the_organisms_words_make_its_world():
    made = make_tokenizers()
    assert reads_world(made) and not reads_world(None)
    assert not reads_world(made._replace(t5=made.clip))


def test_tokenizers_are_read_from_files_as_they_were_made(sibling, tmp_path):
    _, _, pipe = sibling
    for folder, tokenizer in pipe.tokenizers.folders().items():
        tokenizer.save_pretrained(tmp_path / folder)
    again, length = load_tokenizers(tmp_path), pipe.config.defaults.text_tokens
    for caption in ("a blue lemon on the right", ""):
        for name in ("t5_ids", "clip_ids", "t5_mask"):
            one, other = (getattr(encode_prompt(made, caption, length), name) for made in (pipe.tokenizers, again))
            np.testing.assert_array_equal(one, other)
