"""Tokenizers of one token per word: closed, reproducible byte by byte, and long enough for every caption."""

import json
import re

import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.models.tokenizers import SPACE, encode_prompt, load_tokenizers
from difffract_jax.organism.vocabulary import CLIP_TOKENS, TEXT_TOKENS, WORDS, make_tokenizers
from difffract_jax.organism.world import scenes


def save(tokenizers, home):
    tokenizers.clip.save_pretrained(home / "tokenizer")
    tokenizers.t5.save_pretrained(home / "tokenizer_2")
    return home


@pytest.fixture(scope="module")
def made():
    return make_tokenizers()


@pytest.fixture(scope="module")
def loaded(made, tmp_path_factory):
    return load_tokenizers(save(made, tmp_path_factory.mktemp("tokenizers")))


@pytest.fixture(params=["made", "loaded"])
def tokenizers(request):
    return request.getfixturevalue(request.param)


def test_every_word_is_one_token_of_both(tokenizers):
    t5 = [tokenizers.t5(word).input_ids for word in WORDS]
    clip = [tokenizers.clip(word).input_ids for word in WORDS]
    assert all(len(ids) == 2 and ids[1] == tokenizers.t5.eos_token_id for ids in t5)
    assert all(
        len(ids) == 3 and (ids[0], ids[2]) == (tokenizers.clip.bos_token_id, tokenizers.clip.eos_token_id)
        for ids in clip
    )
    assert len({ids[0] for ids in t5}) == len({ids[1] for ids in clip}) == len(WORDS)
    assert tokenizers.t5.unk_token_id not in {ids[0] for ids in t5}


def test_words_keep_their_ids_when_saved_and_loaded(made, loaded):
    assert made.t5.get_vocab() == loaded.t5.get_vocab()
    assert made.clip.get_vocab() == loaded.clip.get_vocab()
    assert loaded.clip_length == made.clip_length == CLIP_TOKENS


def test_building_twice_gives_the_same_files_byte_by_byte(made, tmp_path):
    first, second = (save(tokenizers, tmp_path / name) for name, tokenizers in (("a", made), ("b", make_tokenizers())))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    assert json.loads((first / "tokenizer_2" / "tokenizer_config.json").read_text())["closed_vocabulary"]


def test_captions_use_known_words_only_and_fit(made):
    drawn = [
        *scenes(0, 0, 3000).captions,
        *scenes(0, 0, 300, "held out").captions,
        *scenes(0, 0, 1000, "held out", (3,)).captions,
    ]
    assert {word for text in drawn for word in text.split()} == set(WORDS)
    longest = max(drawn, key=lambda text: len(text.split()))
    assert len(longest.split()) <= min(TEXT_TOKENS - 1, CLIP_TOKENS - 2)
    ids = encode_prompt(made, longest, TEXT_TOKENS)
    assert ids.cut == "" and ids.t5_mask.sum() == len(longest.split()) + 1


def test_capitals_and_punctuation_do_not_change_the_ids(tokenizers):
    plain = encode_prompt(tokenizers, "a red circle left of a lemon", TEXT_TOKENS)
    other = encode_prompt(tokenizers, "  A RED circle,\nleft of a (lemon)!", TEXT_TOKENS)
    for ours, expected in zip(other, plain, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_the_empty_prompt_is_its_closing_token(tokenizers):
    ids = encode_prompt(tokenizers, "", TEXT_TOKENS)
    assert ids.t5_mask.sum() == 1 and ids.t5_ids[0] == tokenizers.t5.eos_token_id


def test_ids_are_those_of_the_words_closed_and_filled_up(tokenizers):
    ids = encode_prompt(tokenizers, "a lemon", TEXT_TOKENS)
    vocabulary = tokenizers.t5.get_vocab()
    expected = [vocabulary[f"{SPACE}a"], vocabulary[f"{SPACE}lemon"], tokenizers.t5.eos_token_id]
    assert ids.t5_ids.tolist() == expected + [tokenizers.t5.pad_token_id] * (TEXT_TOKENS - 3)
    assert len(ids.clip_ids) == CLIP_TOKENS


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a red cirle", f"The model's vocabulary of {len(WORDS)} words lacks `cirle`; did you mean `circle`?"),
        ("a violet Squares and a lemon", "lacks `violet`"),
        ("a violet Squares and a lemon", "`squares`; did you mean `square`?"),
        ("a lemon2", "lacks `lemon2`; did you mean `lemon`?"),
        ("a cirle and a lemon2", "`cirle`; did you mean `circle`? `lemon2`; did you mean `lemon`?"),
    ],
)
def test_unknown_words_are_refused_by_name_with_the_nearest_known_one(tokenizers, prompt, told):
    with pytest.raises(UserError) as caught:
        encode_prompt(tokenizers, prompt, TEXT_TOKENS)
    assert told in str(caught.value)
    assert str(caught.value).count("\n") == 0 and str(caught.value)[-1] in ".?"
    assert not re.search(r"[.;?]{2}", str(caught.value))
    assert "`lemon`;" not in str(caught.value)


@pytest.mark.parametrize("words", [TEXT_TOKENS - 1, TEXT_TOKENS, 2 * TEXT_TOKENS])
def test_what_does_not_fit_is_told(tokenizers, words):
    prompt = [WORDS[i % len(WORDS)] for i in range(words)]
    ids = encode_prompt(tokenizers, " ".join(prompt), TEXT_TOKENS)
    assert ids.cut == " ".join(prompt[TEXT_TOKENS - 1 :])
    assert ids.t5_mask.all() and ids.t5_ids[-1] == tokenizers.t5.eos_token_id
    assert ids.clip_ids[-1] == tokenizers.clip.eos_token_id
    # Both encoders see the same words.
    last = prompt[TEXT_TOKENS - 2]
    assert ids.t5_ids[-2] == tokenizers.t5.get_vocab()[SPACE + last]
    assert ids.clip_ids[-2] == tokenizers.clip.get_vocab()[f"{last}</w>"]
