"""PyTorch checkpoints into this package's trees of weights, and back, by tables of rules.

rules mapping               the engine: rules, transforms, coverage, making leaves slice by slice
weight_files source          which files of a directory hold its weights, and their tensors, read lazily
quantised contents          fp8 and its scales; what a file is that holds something else
flux flux2 sd3 chroma       the MM-DiTs' tables, of diffusers and of the original single file
lora lora_files merging     LoRAs: files, the leaves they change, and the changed weights
export                      a pipeline of ours as a diffusers directory
pipeline_kind kinds         what is known of each kind of pipeline; a further one is a row of `kinds`
chroma_pipeline             such a kind that is read as a whole
configurations pipelines    whole pipelines, and transformers completed by a base
text_encoders qwen3 autoencoder   the tables of T5, CLIP, Qwen3 and the autoencoder
descriptions described      what a directory that is written says of a pipeline, and of its text encoders
transcoders                 the tables of the reference's transcoders and SAEs
torch_files                 `.pt` files, PyTorch's noise, PyTorch's transformer of `convert check`
torch_text                  its text encoders
torch_sd3 torch_chroma      its transformer of Stable Diffusion 3; that of Chroma, and Chroma's T5
torch_trace                 activations of a PyTorch run, for `difffract trace --activations`
check                       `difffract convert check`: the converted model against the PyTorch one, block by block
"""
