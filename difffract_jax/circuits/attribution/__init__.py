"""From a trace and a target to a graph.

attribute       all of it
outputs         directions of the velocity and pixel objectives as targets
selection       from a feature as written to its row of the table
sources         what the places of a row of edges stand for
expansion       which features to expand next; the expanded edges become a graph
engine          targets pulled back through one step or several
carried         what cotangents bring from one step to the earlier ones
pullback        edges into many targets at once, through one step
walk            cotangents down through the blocks; contraction: edges of one block's features
rounding        products in bfloat16
plan            will a trace fit a TPU?
"""
