"""Circuits: from one denoising step of one run to a graph of features, and back to the model.

notation        how features and edits are written
trace           a run, recorded
frozen          the replacement of a trace, affine in its sources
attribution     a trace and a target become a graph (`difffract_jax.graphs`)
effects         heads, readings, total effects
editing         features found, and edited in the running model
checks          a graph held against its model
"""
