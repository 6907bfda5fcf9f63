"""Files of graphs, and formats of other tools.

reader          any readable file as a graph
json_text       JSON of whatever encoding, held against tables of fields
reference_json  the reference's JSON, read and written; reference_fields: what is read of it
viewer_json     graphs for circuit-tracer's viewer and for Neuronpedia
viewer_document their documents, read and checked
viewer_graph    their documents, taken for graphs; viewer_links: the nodes that links join
feature_files   examples of features, for the same viewers
tables          GraphML and CSV
"""
