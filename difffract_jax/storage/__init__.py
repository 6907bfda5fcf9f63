"""Files: written whole or not at all, trees of arrays in them, and their hashes.

files           atomic files and directories; safetensors, memory-mapped
locks           one writer at a time of an output
checkpoint      any tree of arrays, saved and loaded; its hash
sums            SHA256 sums of a directory's files
"""
