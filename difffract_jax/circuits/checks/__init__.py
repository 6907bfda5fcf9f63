"""A graph held against its model.

rerun           the run behind a saved graph, captured anew
variants        many variants of a run side by side; edges by push-forward
faithfulness    features taken off in the real model
predictions     what a graph says of that, and how well it agrees (NumPy)
completeness    what a circuit's features recover alone, and what is lost without them
validation      all of it
edit_runs       many edits side by side: what targets read, how far activations move
trial_edits     which edits a grade tries, and random ones beside them
grading         edits tried in the model beside what the graph predicts: its grade
grade_report    the grade as tables, words and a figure
summaries       what it found in words and short tables, the target's own figures first (NumPy)
report          its report and figures
"""
