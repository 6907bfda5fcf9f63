"""One step of one run, or consecutive steps, recorded.

record          what one step computes and a trace holds fixed
capture         the run, up to the steps that are recorded
imported        a trace from activations that PyTorch recorded
"""
