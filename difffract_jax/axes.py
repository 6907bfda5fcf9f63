"""The words for array axes, the same in annotations, docstrings, sharding rules and plots.

One word, one axis: `Float[Array, "txt d_model"]` is one row per text token, one column per residual channel.
In einsum strings an axis has one letter: q and k positions, h heads, d head_dim, m d_model, f feat, l layer, t target.
"""

AXES: dict[str, str] = {
    "layer": "blocks of one stack, from the first",
    "step": "denoising steps, from the noisiest",
    "txt": "text tokens",
    "img": "image tokens, row by row",
    "seq": "text tokens, then image tokens",
    "d_model": "channels of the residual stream",
    "d_ff": "hidden columns of an MLP",
    "heads": "attention heads, each with its head_dim columns",
    "head_dim": "columns of one attention head",
    "feat": "features of one transcoder",
    "active": "places for a position's active features, filled from the front",
    "time_embed": "channels of a transcoder's time embedding",
    "time_embed_out": "the same, on the output side of a square matrix",
    "d_model_out": "d_model on the output side of a square matrix",
    "modulation": "shift, scale and gate vectors, side by side",
    "inputs": "channels that enter the model",
    "outputs": "channels that leave the model",
    "text_width": "channels of a text embedding",
    "pooled_width": "channels of the pooled prompt embedding",
    "channels": "channels of a packed latent: latent channel, then row, then column of its 2 x 2 patch",
    "target": "features whose incoming edges are computed together",
    "source": "everything an edge can come from, in the order of the source table",
    "node": "nodes of a graph",
    "edge": "edges of a graph",
    "vocab": "tokens a tokenizer knows",
    "buckets": "classes of distance between two text tokens",
    "head": "attention heads, one number each",
    "t5_width": "channels of T5's residual stream",
}
"""Axis -> what one index along it stands for."""
