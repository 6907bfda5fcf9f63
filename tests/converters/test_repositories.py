"""Which files of a repository are read, by its list of paths alone."""

import pytest

from converters.repositories import describing_files, listed_variants, own_files, transcoder_files, weight_files
from converters.weight_files import locate
from difffract_jax.config import UserError

TRANSFORMER = "transformer/diffusion_pytorch_model"
SCHNELL = [
    *(".gitattributes", "README.md", "LICENSE", "schnell_grid.jpeg", "ae.safetensors", "flux1-schnell.safetensors"),
    *("model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json"),
    *("text_encoder/config.json", "text_encoder_2/config.json", "text_encoder/model.safetensors"),
    *(f"text_encoder_2/model-0000{i}-of-00002.safetensors" for i in (1, 2)),
    *("text_encoder_2/model.safetensors.index.json", "vae/diffusion_pytorch_model.safetensors"),
    *(f"tokenizer/{name}" for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")),
    *(f"tokenizer_2/{name}" for name in ("special_tokens_map.json", "spiece.model", "tokenizer.json")),
    "tokenizer_2/tokenizer_config.json",
    *(f"{TRANSFORMER}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    f"{TRANSFORMER}.safetensors.index.json",
]
"""The files of black-forest-labs/FLUX.1-schnell."""
UNREAD = {".gitattributes", "README.md", "LICENSE", "schnell_grid.jpeg", "ae.safetensors", "flux1-schnell.safetensors"}
SHARDS = [f"{TRANSFORMER}-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX = f"{TRANSFORMER}.safetensors.index.json"
SITES = [f"tt/transcoder_{stream}_{layer}.pt" for stream in ("img", "txt") for layer in range(3)]


def test_of_the_release_everything_is_read_but_second_copies_and_pictures() -> None:
    weights = weight_files(SCHNELL, ("transformer", "t5", "clip", "vae"), "it")
    assert {*describing_files(SCHNELL), *weights} == {*SCHNELL} - UNREAD
    assert not {*describing_files(SCHNELL)} & {*weights}
    assert not [
        path for path in weight_files(SCHNELL, ("t5", "vae"), "it") if path.startswith(("trans", "text_encoder/"))
    ]


@pytest.mark.parametrize(
    ("held", "read"),
    [
        ([f"{TRANSFORMER}.safetensors", f"{TRANSFORMER}.fp16.safetensors"], [f"{TRANSFORMER}.safetensors"]),
        ([*SHARDS, INDEX, f"{TRANSFORMER}.safetensors"], [*SHARDS, INDEX]),
        ([INDEX, f"{TRANSFORMER}.safetensors"], [f"{TRANSFORMER}.safetensors"]),
        ([f"{TRANSFORMER}.fp8.safetensors", f"{TRANSFORMER}.bin"], [f"{TRANSFORMER}.fp8.safetensors"]),
        (
            [
                *(f"{TRANSFORMER}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)),
                f"{TRANSFORMER}.safetensors.index.fp16.json",
                f"{TRANSFORMER}.fp16.bin",
            ],
            [
                *(f"{TRANSFORMER}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)),
                f"{TRANSFORMER}.safetensors.index.fp16.json",
            ],
        ),
        (["transformer/model.safetensors", f"{TRANSFORMER}.safetensors"], [f"{TRANSFORMER}.safetensors"]),
        (["transformer/flux-fp8.safetensors", "transformer/config.json"], ["transformer/flux-fp8.safetensors"]),
        (["transformer/b.safetensors", f"{TRANSFORMER}.fp16.safetensors"], [f"{TRANSFORMER}.fp16.safetensors"]),
    ],
)
def test_a_part_is_read_in_one_precision_and_one_copy(held, read) -> None:
    assert sorted(weight_files(held, ("transformer",), "it")) == sorted(read)


def test_a_precision_is_chosen_as_in_a_directory_here(tmp_path) -> None:
    names = [f"{TRANSFORMER}.{variant}.safetensors" for variant in ("fp16", "bf16")]
    assert weight_files(names, ("transformer",), "it", "fp16") == names[:1]
    (tmp_path / "transformer").mkdir()
    for name in names:
        (tmp_path / name).touch()
    for variant in (None, "fp8"):
        with pytest.raises(UserError, match="it/transformer holds its weights in the variants bf16 and fp16 alone"):
            weight_files(names, ("transformer",), "it", variant)
        with pytest.raises(UserError):
            locate(tmp_path / "transformer", variant)
    assert listed_variants([*names, "vae/model.safetensors"]) == {"bf16", "fp16"}


def test_parts_without_safetensors_are_told_together() -> None:
    held = ["transformer/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors"]
    with pytest.raises(UserError) as told:
        weight_files(held, ("transformer", "clip", "vae"), "someone/flux")
    assert "someone/flux holds no safetensors in transformer/ (found diffusion_pytorch_model.bin)" in str(told.value)
    assert "text_encoder/ (found nothing)" in str(told.value) and "vae" not in str(told.value)


def test_of_a_directory_of_ours_weights_labels_and_tokenizers_are_read() -> None:
    held = ["config.json", "img.safetensors", "labels.json", "tokenizer/tokenizer.json", "t5.safetensors.index.json"]
    assert own_files([*held, "README.md", "report/report.md", "samples.png", "SHA256SUMS"]) == held


def test_of_transcoders_the_files_of_the_wanted_sites_are_read_in_one_format() -> None:
    files = [path.removeprefix("tt/") for path in SITES]
    assert transcoder_files([*files, "README.md"], None, "it") == files
    assert transcoder_files(files, ["img/1-2", "txt/0"], "it") == [files[1], files[2], files[3]]
    assert transcoder_files(["sae_img_007.safetensors"], ["img/7"], "it") == ["sae_img_007.safetensors"]
    both = [*files, "transcoder_img_0.pth"]
    assert transcoder_files(both, ["*/0"], "it") == [files[0], files[3]]
    # A site that only another format has is not left out.
    mixed = [*files, "transcoder_img_2.safetensors", "transcoder_img_3.safetensors"]
    assert transcoder_files(mixed, None, "it") == [*files, "transcoder_img_3.safetensors"]
    with pytest.raises(UserError, match="holds transcoder_img_0.pt and transcoder_img_0_final.pt, all of img/0"):
        transcoder_files([*files, "transcoder_img_0_final.pt"], None, "it")
    with pytest.raises(UserError, match="holds none of the sites img/9; it has img/0, img/1, img/2, txt/0"):
        transcoder_files(files, ["img/1", "img/9"], "it")


def test_where_transcoders_lie_in_folders_these_are_named() -> None:
    with pytest.raises(UserError, match="name the folder that holds them: hf:a/b/saes or hf:a/b/tt"):
        transcoder_files([*SITES, "saes/sae_img_6.pt", "README.md"], None, "hf:a/b")
    with pytest.raises(UserError, match="give another repository"):
        transcoder_files(["README.md"], None, "hf:a/b")
