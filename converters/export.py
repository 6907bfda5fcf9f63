"""A pipeline of ours as a diffusers directory, which `FluxPipeline.from_pretrained` loads.

1. Every part's `config.json` says what our configuration says, in the words of its library.
2. Every part's weights are the rule tables run backwards, tensor by tensor, in shards where they are large.
3. The tokenizers are saved as they are; `model_index.json` names the parts' classes.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.autoencoder import AUTOENCODER_DIFFUSERS
from converters.flux import FLUX_DIFFUSERS, flux_config_to_diffusers
from converters.mapping import Rule, save_tree, source_shapes
from converters.text_encoders import CLIP_TRANSFORMERS, t5_tables
from difffract_jax.models.autoencoder import AutoencoderConfig
from difffract_jax.models.clip import CLIPConfig
from difffract_jax.models.pipeline import Pipeline, PipelineConfig
from difffract_jax.models.sampler import SchedulerConfig
from difffract_jax.models.t5 import T5Config
from difffract_jax.storage.checkpoint import atomic_directory, leaf_paths
from difffract_jax.storage.shards import write_sharded

INDEX = {
    "_class_name": "FluxPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export_pipeline(pipe: Pipeline, out: str | Path, *, overwrite: bool = False) -> None:
    """Writes a diffusers directory.

    Args:
        pipe: the pipeline.
        out: directory to write; it appears only when it is complete.
        overwrite: replace an existing directory.
    """
    t5_rules = t5_tables([] if pipe.config.t5.gated else ["shared.weight", ".DenseReluDense.wi."]).rules
    with atomic_directory(out, overwrite=overwrite) as partial:
        for name, content in descriptions(pipe.config).items():
            write_json(partial / name, content)
        _write_part(partial / "transformer", pipe.transformer, FLUX_DIFFUSERS, "diffusion_pytorch_model")
        _write_part(partial / "vae", pipe.vae, AUTOENCODER_DIFFUSERS, "diffusion_pytorch_model")
        _write_part(partial / "text_encoder", pipe.clip, CLIP_TRANSFORMERS, "model")
        _write_part(partial / "text_encoder_2", pipe.t5, t5_rules, "model")
        pipe.tokenizers.clip.save_pretrained(partial / "tokenizer")
        pipe.tokenizers.t5.save_pretrained(partial / "tokenizer_2")


def descriptions(config: PipelineConfig) -> dict[str, dict[str, Any]]:
    """Returns the JSON files that describe a pipeline in its directory, by their paths; `model_index.json` comes last.

    Args:
        config: of the pipeline.
    """
    return {
        "scheduler/scheduler_config.json": _scheduler(config.scheduler),
        "transformer/config.json": flux_config_to_diffusers(config.transformer),
        "vae/config.json": _autoencoder(config.vae, max(config.defaults.height, config.defaults.width)),
        "text_encoder/config.json": _clip(config.clip),
        "text_encoder_2/config.json": _t5(config.t5),
        "model_index.json": INDEX,
    }


def _write_part(directory: Path, module: Any, rules: Sequence[Rule], stem: str) -> None:
    dtype = np.dtype(next(iter(leaf_paths(module).values())).dtype)
    shapes = source_shapes(rules, module)
    tensors = save_tree(module, rules)
    write_sharded(
        directory, stem, {key: (dtype, shape) for key, shape in shapes.items()}, lambda key: _next(tensors, key)
    )


def _next(tensors: Iterator[tuple[str, np.ndarray]], key: str) -> np.ndarray:
    """Returns the next tensor, which must be the one that the file wants next."""
    found, tensor = next(tensors)
    assert found == key, f"{found} came where {key} was due"
    return tensor


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file of a diffusers directory; its folder is made where it is missing."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _scheduler(config: SchedulerConfig) -> dict[str, Any]:
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", **vars(config)}


def _autoencoder(config: AutoencoderConfig, sample_size: int) -> dict[str, Any]:
    levels = len(config.widths)
    return {
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
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": config.post_quant_conv,
        "use_quant_conv": config.quant_conv,
    }


def _clip(config: CLIPConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "eos_token_id": config.eos_token_id,
        "hidden_act": config.activation,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "layer_norm_eps": config.eps,
        "max_position_embeddings": config.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "vocab_size": config.vocab,
    }


def _t5(config: T5Config) -> dict[str, Any]:
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": config.d_ff,
        "d_kv": config.d_kv,
        "d_model": config.d_model,
        "dense_act_fn": config.activation,
        "feed_forward_proj": "gated-gelu" if config.gated else "relu",
        "is_encoder_decoder": False,
        "is_gated_act": config.gated,
        "layer_norm_epsilon": config.eps,
        "model_type": "t5",
        "num_heads": config.heads,
        "num_layers": config.layers,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.buckets,
        "vocab_size": config.vocab,
    }
