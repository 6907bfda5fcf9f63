"""Embeddings of prompts in a file: read as written, used instead of encoders, and refused where they do not belong."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.models.embeddings import embed_prompts, read_embeddings, with_embeddings, write_embeddings
from difffract_jax.models.pipeline import encode, generate
from difffract_jax.models.tiny import random_pipeline

PROMPTS = ("a red circle", "blue, and a very long prompt " * 8)


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()._replace(source="0123456789abcdef")


@pytest.fixture(scope="module")
def file(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("embeddings") / "prompts.npz"
    write_embeddings(embed_prompts(pipe, PROMPTS, pipe.plan().text_tokens), path, {"command": "encode"})
    return path


def test_embeddings_are_read_as_they_were_written_and_hold_the_empty_prompt(pipe, file):
    found = read_embeddings(file)
    assert list(found.prompts) == [*PROMPTS, ""]
    for prompt, one in found.prompts.items():
        made = encode(pipe, prompt, found.text_tokens)
        np.testing.assert_array_equal(one.text, made.text)
        np.testing.assert_array_equal(one.pooled, made.pooled)
        np.testing.assert_array_equal(one.mask, made.mask)
        assert one.cut == made.cut
    assert found.prompts[PROMPTS[1]].cut, "the long prompt is cut"


def test_bfloat16_embeddings_keep_their_bits(tmp_path):
    pipe = random_pipeline(dtype=jnp.bfloat16)
    made = embed_prompts(pipe, PROMPTS[:1], 40)
    write_embeddings(made, tmp_path / "half.npz")
    found = read_embeddings(tmp_path / "half.npz").prompts[PROMPTS[0]]
    assert found.text.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.text, made.prompts[PROMPTS[0]].text)


def test_images_from_embeddings_are_those_of_the_encoders(pipe, file):
    without = with_embeddings(pipe, read_embeddings(file))
    assert without.t5 is None and without.clip is None
    np.testing.assert_array_equal(generate(without, PROMPTS[0]).image, generate(pipe, PROMPTS[0]).image)


def test_another_prompt_length_or_model_is_refused(pipe, file):
    embeddings = read_embeddings(file)
    without = with_embeddings(pipe, embeddings)
    with pytest.raises(UserError, match='holds no embedding of the prompt "a green square", but of "a red circle"'):
        generate(without, "a green square")
    with pytest.raises(
        UserError, match="holds embeddings of 40 text tokens, but the run has 24; give --text-tokens 40"
    ):
        generate(without, PROMPTS[0], run=pipe.plan(text_tokens=24))
    with pytest.raises(UserError, match="were made by another model: its content hash is 0123456789ab"):
        with_embeddings(pipe._replace(source="another"), embeddings)


def test_embeddings_of_other_widths_are_refused(pipe, file):
    embeddings = read_embeddings(file)
    narrow = {prompt: one._replace(text=one.text[:, :8]) for prompt, one in embeddings.prompts.items()}
    with pytest.raises(UserError, match="should hold text of width .* encode again"):
        with_embeddings(pipe, embeddings._replace(prompts=narrow))


@pytest.mark.parametrize("kind", ["absent", "text", "cut", "graph", "infinite", "version"])
def test_what_is_not_a_file_of_embeddings_is_refused(file, tmp_path, kind):
    path = tmp_path / "given.npz"
    if kind == "text":
        path.write_text("a red circle", encoding="utf-8")
    elif kind == "cut":
        path.write_bytes(file.read_bytes()[:2000])
    elif kind == "graph":
        np.savez(path, node_kind=np.zeros(3))
    elif kind in ("infinite", "version"):
        with np.load(file) as held:
            arrays = dict(held)
        metadata = json.loads(str(arrays["metadata"][()]))
        if kind == "infinite":
            arrays["text"][0, 0, 0] = np.inf
        else:
            metadata["format_version"] = 99
        np.savez(path, **{**arrays, "metadata": np.array(json.dumps(metadata))})
    with pytest.raises(UserError, match="encode") as refused:
        read_embeddings(path)
    assert "given.npz" in str(refused.value)
