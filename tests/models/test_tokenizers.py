"""Tokenizers against the golden ids, prompts of every length, and incomplete directories."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors

from difffract_jax.config import UserError
from difffract_jax.models.tokenizers import encode_prompt, load_tokenizers
from tolerances import REFERENCE

PIPELINE = REFERENCE / "pipeline"
SPIECE = REFERENCE.parent / "tokenizers" / "spiece.model"
"""A T5 model of 73 pieces, trained with sentencepiece 0.2.3 on captions; its rules are a few of NFKC's."""
SPIECE_IDS = {
    "a red fox at dawn, oil painting": [16, 25, 15, 72, 39, 6, 13, 3, 1],
    "ﬁre ① fox": [38, 71, 2, 15, 1],
    "Ａ ｒｅｄ ｆｏｘ": [71, 2, 71, 2, 71, 2, 1],
    "a\u00a0red\u3000fox": [16, 25, 15, 1],
    "a red fox™ ½": [16, 25, 15, 2, 71, 2, 1],
    "  two  spaces ": [71, 64, 50, 65, 71, 52, 56, 68, 57, 70, 52, 1],
    "tab\tand\nline": [71, 64, 68, 59, 9, 71, 67, 69, 66, 70, 1],
    "unknown ☃☃ snow ☃": [71, 51, 66, 2, 66, 65, 50, 66, 71, 2, 71, 52, 66, 65, 50, 71, 2, 1],
    "": [1],
}
"""What sentencepiece 0.2.3 makes of texts with it, and </s>."""
PROMPTS = {
    "p0": "a red fox at dawn, oil painting",
    "p1": "lighthouse and a tin robot in heavy fog, pixel art, emerald green",
}


@pytest.fixture(scope="module")
def tokenizers():
    return load_tokenizers(PIPELINE)


@pytest.fixture
def pipeline(tmp_path):
    """A copy of the tokenizers to break."""
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).mkdir()
        for file in (PIPELINE / name).iterdir():
            shutil.copyfile(file, tmp_path / name / file.name)
    return tmp_path


@pytest.mark.parametrize("prompt", PROMPTS)
def test_golden_ids_are_met(tokenizers, prompt):
    golden = np.load(REFERENCE / "golden_forward.npz")
    ids = encode_prompt(tokenizers, PROMPTS[prompt], 16)
    np.testing.assert_array_equal(ids.t5_ids, golden[f"{prompt}_t5_input_ids"])
    np.testing.assert_array_equal(ids.clip_ids, golden[f"{prompt}_clip_input_ids"])
    # The golden prompts end with </s> = 1, followed by padding = 0.
    np.testing.assert_array_equal(ids.t5_mask, golden[f"{prompt}_t5_input_ids"] > 0)
    assert ids.t5_ids.dtype == ids.clip_ids.dtype == np.int32
    assert ids.cut == ""


def test_the_vocabulary_files_of_the_flux_releases_do_as_well(pipeline, tokenizers):
    (pipeline / "tokenizer" / "tokenizer.json").unlink()
    for prompt in PROMPTS.values():
        ids = encode_prompt(load_tokenizers(pipeline), prompt, 16)
        np.testing.assert_array_equal(ids.clip_ids, encode_prompt(tokenizers, prompt, 16).clip_ids)


@pytest.mark.parametrize("length", range(1, 11))
def test_a_cut_prompt_is_what_transformers_makes_of_it_and_says_what_was_lost(tokenizers, length):
    prompt = PROMPTS["p0"]
    ids = encode_prompt(tokenizers, prompt, length)
    expected = tokenizers.t5(prompt, padding="max_length", truncation=True, max_length=length).input_ids
    np.testing.assert_array_equal(ids.t5_ids, expected)
    words = ["a", "red", "fox", "at", "dawn", ",", "oil", "painting"]
    assert ids.cut.replace(" ", "") == "".join(words[length - 1 :] if length < 9 else [])
    assert prompt.endswith(ids.cut)
    assert ids.t5_mask.sum() == min(length, 9)


def test_a_prompt_longer_than_clip_is_cut_as_transformers_cuts_it(tokenizers):
    prompt = PROMPTS["p1"] * 3
    expected = tokenizers.clip(prompt, truncation=True, max_length=32).input_ids
    np.testing.assert_array_equal(encode_prompt(tokenizers, prompt, 16).clip_ids, expected)


def test_the_empty_prompt_is_a_closing_token(tokenizers):
    ids = encode_prompt(tokenizers, "", 4)
    assert ids.t5_ids.tolist() == [1, 0, 0, 0]
    assert ids.t5_mask.tolist() == [True, False, False, False]
    assert ids.cut == ""


def test_a_text_length_of_nothing_is_refused(tokenizers):
    with pytest.raises(UserError, match="text_tokens must be at least 1, but got 0"):
        encode_prompt(tokenizers, "a", 0)


@pytest.mark.parametrize(
    ("lost", "wanted"),
    [
        (["tokenizer/tokenizer.json", "tokenizer/merges.txt"], "tokenizer.json, or vocab.json and merges.txt"),
        (["tokenizer_2/tokenizer.json"], "tokenizer_2 lacks .* must hold tokenizer.json, or spiece.model"),
    ],
)
def test_missing_files_are_named(pipeline, lost, wanted):
    for name in lost:
        (pipeline / name).unlink()
    with pytest.raises(UserError, match=wanted):
        load_tokenizers(pipeline)


def test_a_truncated_file_is_named(pipeline):
    path = pipeline / "tokenizer_2" / "tokenizer.json"
    path.write_text(path.read_text()[:1000])
    with pytest.raises(UserError, match="tokenizer_2.tokenizer.json is not readable as JSON"):
        load_tokenizers(pipeline)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_with_a_byte_order_mark_are_the_same_tokenizer(pipeline, tokenizers, encoding):
    for file in pipeline.glob("*/*"):
        if file.suffix in (".json", ".txt"):
            file.write_text(file.read_text(encoding="utf-8"), encoding=encoding)
    ours, theirs = (encode_prompt(each, PROMPTS["p0"], 16) for each in (load_tokenizers(pipeline), tokenizers))
    assert np.array_equal(ours.t5_ids, theirs.t5_ids) and np.array_equal(ours.clip_ids, theirs.clip_ids)


def test_vocabulary_and_merges_may_have_marks_too(pipeline, tokenizers):
    home = pipeline / "tokenizer"
    held = json.loads((home / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in held["merges"]]
    for mark in ("utf-8", "utf-8-sig"):
        (home / "vocab.json").write_text(json.dumps(held["vocab"]), encoding=mark)
        (home / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding=mark)
        (home / "tokenizer.json").unlink(missing_ok=True)
        found = encode_prompt(load_tokenizers(pipeline), PROMPTS["p0"], 16)
        assert np.array_equal(found.clip_ids, encode_prompt(tokenizers, PROMPTS["p0"], 16).clip_ids)


def test_a_clip_tokenizer_without_a_length_is_refused(pipeline):
    (pipeline / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="model_max_length"):
        load_tokenizers(pipeline)


def changed(name, change):
    """Changes the tokenizer.json of a pipeline's directory; returns it as `tokenizers` reads it."""
    file = name / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    change(tokenizer)
    tokenizer.save(str(file))
    return Tokenizer.from_file(str(file))


def set_normaliser(tokenizer):
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex("[aeiou]x"), "ox")])


def set_pre_tokeniser(tokenizer):
    added = pre_tokenizers.Split(Regex("[aeiou]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([added, tokenizer.pre_tokenizer])


def set_post_processor(tokenizer):
    special = tokenizer.get_vocab_size() - 1
    token = tokenizer.id_to_token(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A {token}", special_tokens=[(token, special)]
    )


def pad_and_truncate(tokenizer):
    tokenizer.enable_padding(length=9)
    tokenizer.enable_truncation(4)


@pytest.mark.parametrize("home", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("change", [set_normaliser, set_pre_tokeniser, set_post_processor, pad_and_truncate])
def test_a_tokenizer_does_what_its_file_says(pipeline, tokenizers, home, change):
    theirs = changed(pipeline / home, change)
    theirs.no_padding()
    theirs.no_truncation()
    loaded, name = load_tokenizers(pipeline), "clip_ids" if home == "tokenizer" else "t5_ids"
    differs = False
    for prompt in ("ﬁre ① fox", "Ａ ｒｅｄ ｆｏｘ", "a\u00a0red\u3000fax…", "the </s> end"):
        ids, expected = getattr(encode_prompt(loaded, prompt, 32), name), theirs.encode(prompt).ids
        assert ids[: len(expected)].tolist() == expected[: len(ids)]
        differs |= ids.tolist() != getattr(encode_prompt(tokenizers, prompt, 32), name).tolist()
    assert differs == (change is not pad_and_truncate)
    assert loaded.t5.pad_token_id == 0 and loaded.t5.eos_token_id == 1


def test_what_is_saved_keeps_the_normaliser(pipeline, tmp_path):
    changed(pipeline / "tokenizer_2", set_normaliser)
    first = load_tokenizers(pipeline)
    first.t5.save_pretrained(tmp_path / "saved" / "tokenizer_2")
    first.clip.save_pretrained(tmp_path / "saved" / "tokenizer")
    again = load_tokenizers(tmp_path / "saved")
    assert first.t5("ﬁre ax").input_ids == again.t5("ﬁre ax").input_ids == first.t5("fire ox").input_ids


def test_a_file_without_a_post_processor_still_closes_a_prompt(pipeline, tokenizers):
    def remove(file):
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(content | {"post_processor": None}), encoding="utf-8")

    remove(pipeline / "tokenizer_2" / "tokenizer.json")
    remove(pipeline / "tokenizer" / "tokenizer.json")
    ours, theirs = (encode_prompt(one, PROMPTS["p0"], 16) for one in (load_tokenizers(pipeline), tokenizers))
    assert ours.t5_ids.tolist() == theirs.t5_ids.tolist() and ours.clip_ids.tolist() == theirs.clip_ids.tolist()


@pytest.fixture
def spiece(pipeline):
    """A pipeline whose T5 tokenizer is a SentencePiece model alone."""
    (pipeline / "tokenizer_2" / "tokenizer.json").unlink()
    shutil.copyfile(SPIECE, pipeline / "tokenizer_2" / "spiece.model")
    return pipeline


@pytest.mark.parametrize("configured", [True, False])
def test_a_sentencepiece_model_gives_sentencepiece_s_ids(spiece, tmp_path, configured):
    if not configured:
        (spiece / "tokenizer_2" / "tokenizer_config.json").unlink()
    loaded = load_tokenizers(spiece)
    for prompt, ids in SPIECE_IDS.items():
        assert encode_prompt(loaded, prompt, 32).t5_ids.tolist() == ids + [0] * (32 - len(ids))
    loaded.t5.save_pretrained(tmp_path / "saved" / "tokenizer_2")
    loaded.clip.save_pretrained(tmp_path / "saved" / "tokenizer")
    again = load_tokenizers(tmp_path / "saved")
    assert all(again.t5(prompt).input_ids == ids for prompt, ids in SPIECE_IDS.items())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "spiece.model is not T5's"),
        (b"no model at all", "spiece.model is not a SentencePiece model"),
        (SPIECE.read_bytes()[:1500], "spiece.model is not a SentencePiece model"),
    ],
)
def test_a_broken_sentencepiece_model_is_named(spiece, content, told):
    (spiece / "tokenizer_2" / "spiece.model").write_bytes(content)
    with pytest.raises(UserError, match=told):
        load_tokenizers(spiece)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("tokenizer.json", "{}", r"tokenizer.json is not a tokenizer \(.*Model missing"),
        ("tokenizer.json", "[]", "tokenizer.json holds no JSON object"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json holds no JSON object"),
        ("tokenizer_config.json", '{"pad_token": "<none>"}', r"lacks tokens that its .* names: <none> \(pad_token\)"),
        ("tokenizer_config.json", '{"eos_token": 3}', "transformers cannot load .* as a T5Tokenizer"),
        ("tokenizer_config.json", '{"pad_token": null}', "names no token for padding"),
        ("tokenizer_config.json", '{"model_max_length": "512"}', "model_max_length='512' instead of a number"),
    ],
)
def test_files_that_are_not_of_a_tokenizer_are_named(pipeline, file, content, told):
    (pipeline / "tokenizer_2" / file).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=told):
        load_tokenizers(pipeline)


@pytest.mark.parametrize("extra_ids", ["null", '"5"'])
def test_a_number_of_sentinels_that_is_none_is_refused(spiece, extra_ids):
    config = spiece / "tokenizer_2" / "tokenizer_config.json"
    config.write_text(f'{{"extra_ids": {extra_ids}}}', encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer_config.json has extra_ids=.* instead of a whole number"):
        load_tokenizers(spiece)


def test_clip_s_tokenizer_in_t5_s_place_is_named(pipeline):
    shutil.copyfile(pipeline / "tokenizer" / "tokenizer.json", pipeline / "tokenizer_2" / "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer_2.* holds a BPE model, but that of a T5Tokenizer is Unigram"):
        load_tokenizers(pipeline)


def test_pytorch_is_not_loaded():
    code = (
        "import sys; from difffract_jax.models.tokenizers import encode_prompt, load_tokenizers; "
        f"encode_prompt(load_tokenizers({str(PIPELINE)!r}), 'a fox', 8); print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert run.stdout.strip() == "False"
