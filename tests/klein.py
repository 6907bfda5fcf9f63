"""A tiny FLUX.2-klein of diffusers with random weights, and klein's published sizes."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

PUBLISHED = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "axes_dims_rope": (32, 32, 32, 32),
    "in_channels": 128,
    "joint_attention_dim": 7680,
    "mlp_ratio": 3.0,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
    "guidance_embeds": False,
}
"""FLUX.2-klein-4B's transformer."""
TINY = PUBLISHED | {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 4, 4, 4),
    "in_channels": 16,
    "joint_attention_dim": 48,
}

AUTOENCODER = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 48,
}
ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 29,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
"""What Qwen3's template makes of one message."""


def spread_weights(module, seed=0):
    """Draws weights of variance 1 / inputs, and norm scales around 1, so that nothing is trivially zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
    return module.eval()


def tiny_transformer(seed=0):
    """diffusers' module."""
    return spread_weights(Flux2Transformer2DModel(**TINY), seed)


def run_theirs(module, latents, text, t, grid):
    """Returns diffusers' velocity of one example, in the module's type."""
    dtype = next(module.parameters()).dtype
    image = torch.cartesian_prod(torch.arange(1), torch.arange(grid[0]), torch.arange(grid[1]), torch.arange(1))
    words = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(text.shape[0]))
    with torch.no_grad():
        made = module(
            hidden_states=torch.tensor(latents)[None].to(dtype),
            encoder_hidden_states=torch.tensor(text)[None].to(dtype),
            timestep=torch.tensor([t]),
            img_ids=image[None],
            txt_ids=words[None],
            return_dict=False,
        )[0]
    return made[0].float().numpy()


def tiny_tokenizer():
    """One token per byte."""
    vocab = {one: number for number, one in enumerate([*sorted(ByteLevel.alphabet()), *SPECIAL])}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL[1:2]),
        chat_template=TEMPLATE,
        model_max_length=512,
    )


def tiny_encoder(seed=1):
    """transformers' module."""
    return spread_weights(Qwen3ForCausalLM(Qwen3Config(**ENCODER, vocab_size=264)), seed)


def tiny_autoencoder(seed=2):
    """diffusers' module, with statistics that are not trivial."""
    made = spread_weights(AutoencoderKLFlux2(**AUTOENCODER), seed)
    generator = torch.Generator().manual_seed(seed)
    made.bn.running_mean = torch.randn(16, generator=generator)
    made.bn.running_var = 0.5 + torch.rand(16, generator=generator)
    return made


def tiny_pipeline(distilled=True):
    """diffusers' pipeline of all these; not distilled, it takes guidance by two evaluations a step."""
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=tiny_autoencoder(),
        text_encoder=tiny_encoder(),
        tokenizer=tiny_tokenizer(),
        transformer=tiny_transformer(),
        is_distilled=distilled,
    )
