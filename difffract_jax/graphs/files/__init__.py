"""Formats of other tools.

reference_json  the reference's JSON, read and written
viewer_json     graphs for circuit-tracer's viewer and for Neuronpedia
viewer_document their documents, read and taken for graphs
feature_files   examples of features, for the same viewers
tables          GraphML and CSV
"""
