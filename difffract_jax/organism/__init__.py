"""The embedded model: a FLUX small enough for a laptop, trained on scenes whose content is known.

render       drawing figures
world        scenes, captions, what is held out; endless and seeded
scorer       reading shapes, colours and positions back from pixels
vocabulary   word-level tokenizers
text         pretraining of the text encoders
images       training of the autoencoder
flow         training of the transformer by rectified flow
train        all of it, from nothing to a pipeline, resumable
scored       what the scorer says of images drawn with transcoders in place of MLPs
evaluate     how well images follow captions, and how much every MLP matters
weights/     the trained pipeline, a diffusers directory like any other
"""
