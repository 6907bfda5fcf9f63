"""Qwen3 and its prompts against transformers and diffusers on random weights, and FLUX.2's autoencoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline

from converters.autoencoder import AUTOENCODER_FLUX2, FLUX2_IGNORED, autoencoder_config_from_diffusers
from converters.mapping import ArraySource, load_tree
from converters.qwen3 import qwen3_config_from_transformers, qwen3_tables
from difffract_jax.models.autoencoder import Flux2Autoencoder
from difffract_jax.models.chat_prompts import chat_prompt
from difffract_jax.models.qwen3 import Qwen3Encoder
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.tokenizers import encode_prompt, load_tokenizers, written_tokens
from klein import tiny_autoencoder, tiny_encoder, tiny_tokenizer
from tolerances import TOL, relative_error

PROMPT = "a red fox, été"
WORDS = 64


def arrays(module):
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def theirs():
    return tiny_encoder()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    home = tmp_path_factory.mktemp("klein")
    tiny_tokenizer().save_pretrained(home / "tokenizer")
    return load_tokenizers(home).t5


@pytest.fixture(scope="module")
def ours(theirs, tokenizer):
    config = qwen3_config_from_transformers(theirs.config.to_diff_dict() | {"model_type": "qwen3"}, padding_id=256)
    assert tokenizer.pad_token_id == 256
    tensors = arrays(theirs)
    rules, ignored = qwen3_tables(config, tensors)
    return load_tree(ArraySource("tiny", tensors), rules, abstract_module(Qwen3Encoder, config), ignored=ignored)


@pytest.mark.parametrize("prompt", [PROMPT, "", "many words " * 40])
def test_a_prompt_becomes_the_tokens_that_diffusers_makes_of_it(theirs, tokenizer, prompt):
    seen = {}

    def keep(_, args, given):
        seen.update(given)

    handle = theirs.register_forward_pre_hook(keep, with_kwargs=True)
    Flux2KleinPipeline._get_qwen3_prompt_embeds(theirs, tiny_tokenizer(), prompt, max_sequence_length=WORDS)
    handle.remove()
    read = chat_prompt(tokenizer, prompt, WORDS)
    assert read.ids.tolist() == seen["input_ids"][0].tolist()
    assert read.mask.tolist() == seen["attention_mask"][0].bool().tolist()
    assert bool(read.cut) == (len(prompt) > WORDS)
    assert prompt.endswith(read.cut + " ") or prompt.endswith(read.cut)


@pytest.mark.parametrize("prompt", ["user", "a red fox", "", "<think>", "many words " * 40])
def test_the_template_s_tokens_are_told_apart_from_the_prompt_s_own(tokenizer, prompt):
    read = chat_prompt(tokenizer, prompt, WORDS)
    own = tokenizer.decode(read.ids[read.mask & ~read.template])
    assert own + prompt[len(own) :] == prompt and prompt[len(own) :].strip() == read.cut
    assert read.template[0] and not read.template[~read.mask].any()


def test_a_graph_s_words_show_the_template_s_tokens_in_brackets(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizers = load_tokenizers(tmp_path)
    ids = encode_prompt(tokenizers, "user b", 48)
    words = written_tokens(tokenizers, ids)
    assert words[:2] == ["<|im_start|>", "<|u|>"] and "".join(words[6:12]) == "user\u2581b"
    assert [word for word in words[12:] if not word.startswith("<|")] == ["<pad>"] * (~ids.t5_mask).sum()


def test_a_template_that_leaves_room_for_thinking_ends_before_it(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    texts = []
    for thinking in (False, True):
        tokenizers = load_tokenizers(tmp_path, thinking=thinking)
        texts.append("".join(tokenizers.pieces(encode_prompt(tokenizers, "a b", 48).t5_ids)).replace("<pad>", ""))
    assert texts[0] == texts[1] + "<think>\n\n</think>\n\n" and texts[1].endswith("<|im_start|>assistant\n")


def test_tokens_are_written_as_t5_writes_them(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizers = load_tokenizers(tmp_path)
    ids = encode_prompt(tokenizers, "a b", 32)
    pieces = tokenizers.pieces(ids.t5_ids)
    assert "".join(pieces).startswith("<|im_start|>user\na\u2581b<|im_end|>\n<|im_start|>assistant\n<think>")
    assert [piece == "<pad>" for piece in pieces] == (~ids.t5_mask).tolist()
    assert ids.clip_ids.shape == (0,)


@pytest.mark.parametrize("prompt", [PROMPT, "many words " * 40])
def test_the_text_is_diffusers_padding_included(theirs, ours, tokenizer, prompt):
    with torch.no_grad():
        expected = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            theirs, tiny_tokenizer(), prompt, max_sequence_length=WORDS
        )[0]
    text = jax.jit(Qwen3Encoder.__call__)(ours, jnp.asarray(chat_prompt(tokenizer, prompt, WORDS).ids))
    assert text.shape == (WORDS, 48)
    assert relative_error(text, expected) <= TOL.f32_run  # 27 layers, one after the other


def test_layers_that_are_not_read_are_left_out(theirs, ours):
    assert ours.config.layers == 27
    assert jax.tree.leaves(ours.blocks)[0].shape[0] == 27
    assert theirs.config.num_hidden_layers == 29


@pytest.fixture(scope="module")
def autoencoders():
    theirs = tiny_autoencoder()
    given = {name: value for name, value in theirs.config.items() if name != "_use_default_values"}
    config = autoencoder_config_from_diffusers(given | {"_class_name": "AutoencoderKLFlux2"})
    abstract = abstract_module(Flux2Autoencoder, config)
    return theirs, load_tree(ArraySource("tiny", arrays(theirs)), AUTOENCODER_FLUX2, abstract, ignored=FLUX2_IGNORED)


def test_tokens_decode_to_diffusers_pixels(autoencoders):
    theirs, ours = autoencoders
    tokens, grid = np.random.default_rng(0).standard_normal((12, 16)).astype(np.float32), (3, 4)
    packed = torch.tensor(tokens).T.reshape(1, 16, *grid)
    deviation = torch.sqrt(theirs.bn.running_var + theirs.config.batch_norm_eps)
    latent = packed * deviation.view(1, -1, 1, 1) + theirs.bn.running_mean.view(1, -1, 1, 1)
    with torch.no_grad():
        expected = theirs.decode(Flux2KleinPipeline._unpatchify_latents(latent)).sample[0].permute(1, 2, 0)
    decoded = jax.jit(lambda vae, tokens: vae.decode(vae.unpacked(tokens, grid)))(ours, jnp.asarray(tokens))
    assert decoded.shape == (24, 32, 3)
    assert relative_error(decoded, expected) <= TOL.f32_run


def test_pixels_encode_to_diffusers_latent(autoencoders):
    theirs, ours = autoencoders
    pixels = np.random.default_rng(1).uniform(-1, 1, (24, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.encode(torch.tensor(pixels).permute(2, 0, 1)[None]).latent_dist.mean[0].permute(1, 2, 0)
    mean, _ = jax.jit(Flux2Autoencoder.encode)(ours, jnp.asarray(pixels))
    assert relative_error(mean, expected) <= TOL.f32_run
