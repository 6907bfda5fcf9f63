"""Circuits: from one denoising step of one run to a graph of features, and back to the model.

feature         how features are written: img/3/f401@12#1
record          what one step computes and a trace holds fixed
trace           one step, or consecutive ones, recorded
imported        a trace from activations that PyTorch recorded
replacement     the affine map from sources to every MLP sublayer's input
readout         targets, and what they read
pullback        edges into many targets at once
sources         what the places of a row of edges stand for
engine          targets pulled back through one step or several
selection       from a feature as written to its row
expansion       which features to expand next; what was found becomes a graph (NumPy)
attribution     all of it: a trace and a target to a graph
arrays          a graph's arrays, checked (NumPy)
graph           the graph: its arrays, its file, and how it shows itself (NumPy)
summary         what one wants to see of a graph: a summary, its top nodes, the graph for networkx (NumPy)
provenance      where a graph comes from: its run, its settings, what was done to it (pure Python)
json_values     dataclasses as JSON values and back (pure Python)
influence       how much each node bears on another, on a graph without cycles (NumPy)
scores          how much of a graph its features explain, rather than errors (NumPy)
pruning         which nodes and edges to keep (NumPy)
reference_json  the reference's JSON, read and written (NumPy)
names           what nodes are called (NumPy)
supernodes      features that do the same, grouped (NumPy)
combine         averages and differences of circuits over prompts and seeds (NumPy)
viewer_json     graphs for circuit-tracer's viewer and for Neuronpedia (NumPy)
viewer_document their documents, read and taken for graphs (NumPy)
feature_files   examples of features, for the same viewers (NumPy)
tables          GraphML and CSV (NumPy)
compare         two graphs side by side (NumPy)
edits           how edits are written, and where they act
edit_tables     edits as arrays
region          boxes and masks, and the image tokens in them
interventions   features edited in the running model
sweeps          many edited images in one compiled call
ranking         finding features: by contrast, region, trend or activation
heads           which attention heads carry a target's edges, and what makes an attention score
labels          what features stand for (NumPy)
readings        features scaled, from the exact frozen map to the real model; effects along a graph's paths
total_effects   what every source of all steps adds to an output along all paths, in one backward pass
effect_tables   the same, summed by feature, step and stream
recapture       the run behind a saved graph, captured anew
variants        many variants of a traced run side by side; edges by push-forward
faithfulness    features taken off in the real model, to check a graph
predictions     what a graph says of that, and how well it agrees (NumPy)
completeness    what a circuit's features recover alone, and what is lost without them
validation      all of it: a graph held against its model
validation_report   its report and figures
"""
