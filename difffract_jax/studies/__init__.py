"""The paper's questions as experiments that end in numbers; docs/studies.md registers what each measures.

precision, colour_prior, errors, binding, flow, steps, concept_context, suppressor    the studies; `registry` knows them
            by name, `settings` tells their questions
repair      taking away what speaks for a mistake: what the studies of mistakes share
removing    features taken away, and what becomes of the object they act on
cases       prompts, what they should show instead, and where edits may act
choices     which features to edit, by circuit, contrast, activation or at random; and the edits
evaluations how many evaluations a step may have, where studies read it place by place
outcomes    many edited images at once, what the scorer reads, intervals and paired differences
results     tables, figures and raw numbers, written to a directory
metrics     what an edit did: success, collateral, distances inside and outside a region, effect per size of the edit
scan        what every feature of the organism detects, from scenes whose content is known
truth       which factors every token of the organism's images and captions has
sheets      pictures of many images side by side
"""
