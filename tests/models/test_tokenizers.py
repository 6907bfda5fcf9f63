"""Tokenizers against the golden ids, prompts of every length, and incomplete directories."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.models.tokenizers import encode_prompt, load_tokenizers
from tolerances import REFERENCE

PIPELINE = REFERENCE / "pipeline"
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
        (["tokenizer_2/tokenizer.json"], "tokenizer_2 lacks .* must hold tokenizer.json"),
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


def test_a_clip_tokenizer_without_a_length_is_refused(pipeline):
    (pipeline / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="model_max_length"):
        load_tokenizers(pipeline)


def test_pytorch_is_not_loaded():
    code = (
        "import sys; from difffract_jax.models.tokenizers import encode_prompt, load_tokenizers; "
        f"encode_prompt(load_tokenizers({str(PIPELINE)!r}), 'a fox', 8); print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert run.stdout.strip() == "False"
