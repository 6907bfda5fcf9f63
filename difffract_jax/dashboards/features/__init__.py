"""Pages for features: a corpus scan in two passes, and a static folder that a browser opens without a network.

state    what is kept of every feature while prompts run: a tree of arrays on the device, and how a run changes it
corpus   prompts in batches, and one denoising step of a batch with a tap at every site
scan     the first pass: statistics and the places of examples, kept now and then, so that it can go on
choice   which examples are shown: the strongest, and some of lower quantiles
maps     the second pass: the examples' prompts again, each example's heat map, thumbnails of their images
mean_run gates, norms and the last layer at the mean prompt
links    features up- and downstream by weights, and neighbours by their decoder vectors
effects  what a feature adds to the predicted image directly, as a small picture
record   the result on disk and in Python: `load_scan`
texts    what features are called, from labels files and tables, and what a graph says of them
addresses where a feature's page is, of those that have one
pages    the folder: chunks of data as script files, sprite sheets, the page that reads them
alone    of that folder one feature's page, as one file
request  what is asked for, and what is refused before anything runs
build    all of it, one output directory
"""
