"""Circuits: from one denoising step of one run to a graph of features, and back to the model.

feature         how features are written: img/3/f401@12#1
trace           what one step computed, held fixed
replacement     the affine map from sources to every MLP sublayer's input
pullback        edges into many targets at once
expansion       which features to expand next; what was found becomes a graph (NumPy)
attribution     all of it: a trace and a target to a graph
graph           the graph and its file (NumPy)
influence       how much each node bears on another, on a graph without cycles (NumPy)
pruning         which nodes and edges to keep (NumPy)
reference_json  the reference's JSON, read and written (NumPy)
compare         two graphs side by side (NumPy)
edits           how edits are written, and where they act
edit_tables     edits as arrays
region          boxes and masks, and the image tokens in them
interventions   features edited in the running model
sweeps          many edited images in one compiled call
ranking         finding features: by contrast, region, trend or activation
labels          what features stand for (NumPy)
faithfulness    features taken off in the real model, to check a graph
"""
