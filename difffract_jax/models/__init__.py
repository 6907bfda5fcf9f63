"""MM-DiTs in Flax: every part of their pipelines, from a prompt to an image.

blocks          double- and single-stream blocks: live, frozen or with their MLPs replaced
mmdit           the transformer: embed, blocks, velocity
t5 clip         text encoders
tokenizers      prompts to token ids
autoencoder     latents to pixels and back
sampler         noise levels, packing, starting noise
pipeline        prompt -> image, every piece replaceable
presets         shapes of the published models
tiny            a small random pipeline, in need of no files
"""
