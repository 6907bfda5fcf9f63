"""Files: written whole or not at all, trees of arrays in them, and their hashes.

files           atomic files and directories; safetensors, memory-mapped
locks           one writer at a time of an output
resumable       a directory whose finished parts outlive an interruption
shards          large sets of tensors in several files
checkpoint      any tree of arrays, saved and loaded; its hash
streaming       the same, saved while it is made, a slice of a leaf at a time
sums            SHA256 sums of a directory's files
remote          gs:// and s3:// paths: buckets, local copies, publication
"""
