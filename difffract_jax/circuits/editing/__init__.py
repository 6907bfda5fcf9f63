"""Features found, and edited in the running model.

ranking         finding features: by contrast, region, trend or activation
edit_tables     edits as arrays
interventions   one image with edits; sweeps: many in one compiled call
"""
