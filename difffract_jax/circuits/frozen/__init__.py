"""The local replacement model: a trace with transcoders in place of MLPs and everything else that is not linear held.

encoding        which features are active, their values, and the errors
replacement     the affine map from sources to every MLP sublayer's input
targets         pre-activations as functions of those inputs
"""
