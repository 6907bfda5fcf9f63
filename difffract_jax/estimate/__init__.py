"""How much memory a command needs, counted before anything is loaded, and how much devices have.

weights    bytes of parts, blocks, transcoders
work       a command's work, and the phases of what it needs
counts     the counting, command by command
scanning   what a corpus scan keeps, on the device and on disk
places     devices by name: 24GB, h100, v5e:2x4, host:16GB
"""
