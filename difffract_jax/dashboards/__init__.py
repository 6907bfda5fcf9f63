"""Reports that people look at: one HTML file each, without a network (NumPy only; no weights, no accelerator).

records     what a report shows of a circuit: its strongest features, where each is active, what they stand for
pictures    activation over an image, arrays as PNG, figures as PNG
render      templates filled in; everything that comes from outside is escaped, every picture lies inside the file
"""
