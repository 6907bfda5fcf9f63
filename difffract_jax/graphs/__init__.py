"""Graphs: what a circuit is once it is traced. NumPy only: no weights, no accelerator, no JAX.

arrays          the arrays of a graph, checked; the one definition of the conservation error
graph           the graph and its file
provenance      where a graph comes from; json_values: frozen types as JSON
summary         what a graph says of itself
names           what nodes are called
aggregate       sums over positions
influence       how much each node bears on another, on a graph without cycles
scores          how much of a graph its features explain, rather than errors
pruning         which nodes and edges to keep
supernodes      features that do the same, grouped
combine         averages and differences of circuits over prompts and seeds
compare         two graphs side by side; any readable file as a graph
files           formats of other tools, read and written
"""
