"""The paper's questions as experiments that end in numbers.

metrics   what an edit did: success, collateral, distances inside and outside a region, effect per size of the edit
scan      what every feature of the organism detects, from scenes whose content is known
sheets    pictures of many images side by side
removing  features taken away, and what becomes of the object they act on
flow, steps, concept_context, suppressor    studies registered in docs/studies.md
"""
