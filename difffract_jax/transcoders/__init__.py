"""Sparse stand-ins for the model's MLP sublayers.

transcoder      the module: time-conditioned sparse code of an MLP's input, decoded into its output
"""
