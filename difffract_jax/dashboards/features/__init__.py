"""Pages for features: a corpus scan in two passes, and a static folder that a browser opens without a network.

state    what is kept of every feature while prompts run: a tree of arrays on the device, and how a run changes it
corpus   prompts in batches, and one denoising step of a batch with a tap at every site
scan     the first pass: statistics and the places of examples, kept now and then, so that it can go on
choice   which examples are shown: the strongest, and some of lower quantiles
maps     the second pass: the examples' prompts again, each example's heat map, thumbnails of their images
links    features up- and downstream by weights, and neighbours by their decoder vectors
effects  what a feature adds to the predicted image directly, as a small picture
record   the result on disk and in Python: `load_scan`
labels   what features are called, from labels files and tables of texts
pages    the folder: chunks of data as script files, sprite sheets, the page that reads them
sizes    bytes on the device and on disk, counted before anything is loaded
build    all of it, one output directory
"""
