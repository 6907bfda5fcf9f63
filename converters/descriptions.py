"""What a diffusers directory says of a pipeline: `model_index.json`, and the `config.json` of every part.

Each is our configuration in the words of the part's library; `configurations` reads the same back.
"""

from collections.abc import Mapping
from typing import Any

from converters.described import SCHEDULER, clip_described, qwen3_described, t5_described
from converters.flux import flux_config_to_diffusers
from converters.flux2 import flux2_config_to_diffusers
from converters.kinds import tables_of
from converters.sd3 import sd3_config_to_diffusers
from difffract_jax.models.autoencoder import AutoencoderConfig, Flux2AutoencoderConfig
from difffract_jax.models.flux2 import Flux2Config
from difffract_jax.models.runs import PipelineConfig
from difffract_jax.models.sampler import SchedulerConfig
from difffract_jax.models.sd3 import Sd3Config
from difffract_jax.models.sd3_text import NoTextConfig

_NONE = [None, None]
INDEX = {
    "_class_name": "FluxPipeline",
    "feature_extractor": _NONE,
    "image_encoder": _NONE,
    "scheduler": SCHEDULER,
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
KLEIN_INDEX = {
    "_class_name": "Flux2KleinPipeline",
    "scheduler": SCHEDULER,
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}
SD3_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "feature_extractor": _NONE,
    "image_encoder": _NONE,
    "scheduler": SCHEDULER,
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def descriptions(config: PipelineConfig) -> dict[str, dict[str, Any]]:
    """Returns the JSON files that describe a pipeline in its directory, by their paths; `model_index.json` comes last.

    Args:
        config: of the pipeline, of one of `kinds`.
    """
    shape: Any = config.transformer
    side = max(config.defaults.height, config.defaults.width)
    parts = {"scheduler/scheduler_config.json": _scheduler(config.scheduler)}
    parts["vae/config.json"] = _autoencoder(config.vae, side)
    if isinstance(shape, Sd3Config):
        return parts | _sd3(config, shape, side // config.vae.factor)
    if isinstance(shape, Flux2Config):
        return parts | {
            "transformer/config.json": flux2_config_to_diffusers(shape),
            "text_encoder/config.json": qwen3_described(config.t5),
            "model_index.json": KLEIN_INDEX | {"is_distilled": not config.defaults.two_branches},
        }
    tables = tables_of(shape)
    if tables is not None:
        transformer, encoder = tables.described(config)
        described = {"transformer/config.json": transformer, "text_encoder/config.json": encoder}
        return parts | described | {"model_index.json": dict(tables.index)}
    return parts | {
        "transformer/config.json": flux_config_to_diffusers(shape),
        "text_encoder/config.json": clip_described(config.clip),
        "text_encoder_2/config.json": t5_described(config.t5),
        "model_index.json": INDEX,
    }


def _sd3(config: PipelineConfig, shape: Sd3Config, sample_size: int) -> dict[str, dict[str, Any]]:
    clips: Any = config.clip
    made = {"transformer/config.json": sd3_config_to_diffusers(shape, sample_size)}
    for folder, clip, width in zip(
        ("text_encoder", "text_encoder_2"), (clips.first, clips.second), clips.projections, strict=True
    ):
        projected = {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": width}
        made[f"{folder}/config.json"] = clip_described(clip) | projected
    absent: Mapping[str, Any] = {}
    if isinstance(config.t5, NoTextConfig):
        absent = {"text_encoder_3": _NONE, "tokenizer_3": _NONE}
    else:
        made["text_encoder_3/config.json"] = t5_described(config.t5)
    return made | {"model_index.json": SD3_INDEX | absent}


def _scheduler(config: SchedulerConfig) -> dict[str, Any]:
    said = {name: value for name, value in vars(config).items() if name != "family"}
    return {"_class_name": SCHEDULER[1], **said}


def _autoencoder(config: AutoencoderConfig, sample_size: int) -> dict[str, Any]:
    levels = len(config.widths)
    said = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.norm_groups,
        "out_channels": config.in_channels,
        "sample_size": sample_size,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": config.post_quant_conv,
        "use_quant_conv": config.quant_conv,
    }
    if isinstance(config, Flux2AutoencoderConfig):
        return said | {"_class_name": "AutoencoderKLFlux2", "batch_norm_eps": config.batch_norm_eps}
    return said | {"scaling_factor": config.scaling_factor, "shift_factor": config.shift_factor}
