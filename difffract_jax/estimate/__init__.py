"""How much memory a command needs, counted before anything is loaded, how much devices have, and how long pods take.

weights    bytes of parts, blocks, transcoders
work       a command's work, and the phases of what it needs
counts     the counting, command by command
scanning   what a corpus scan keeps, on the device and on disk
places     devices by name: 24GB, h100, v5e:2x4, host:16GB
training   a training's phases on one device
step_model a training step on a TPU slice: products, memory traffic, what chips exchange
roofline   how long that takes at a chip's peak rates
sweep      a training on slices of many sizes; sweep_report shows it
"""
