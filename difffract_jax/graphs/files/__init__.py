"""Files of graphs, and formats of other tools.

reader          any readable file as a graph
json_text       JSON of whatever encoding, held against tables of fields
reference_json  the reference's JSON, read and written; reference_fields: what is read of it
viewer_json     graphs for circuit-tracer's viewer and for Neuronpedia; their nodes: viewer_nodes, image: viewer_image
viewer_index    the list of graphs that circuit-tracer's viewer reads
viewer_document their documents, read and checked
viewer_graph    their documents, taken for graphs; viewer_links: the nodes that links join
viewer_groups   groups that were made in these viewers
feature_files   examples of features, for the same viewers; run_features: those that a graph tells
tables          GraphML and CSV
"""
