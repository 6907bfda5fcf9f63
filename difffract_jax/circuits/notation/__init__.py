"""How features, edits and places are written, and what features stand for.

feature         img/3/f401@12#1
edits           FEATURE=zero and the like, and where they act
group_edits     edits of groups by their names
region          boxes and masks, and the image tokens in them
labels          what features stand for
"""
