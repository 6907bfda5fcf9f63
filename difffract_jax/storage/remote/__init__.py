"""Buckets: `gs://BUCKET/KEY` and `s3://BUCKET/KEY` where a path can stand; the one place that knows of them.

addresses       how such a path is written, also after `Path` has joined its slashes
failures        what can go wrong, and the sentence for each
patience        trying again: exponential waits with jitter, for what may pass
objects         what a bucket says of an object, and checksums
gcs, s3         what a bucket answers, over HTTP; each speaks of failures in the same words
bucket          one bucket: read, read a range, list, write, upload, delete, each with patience and checksums
publication     a directory that becomes visible whole, by a commit marker; who writes it alone
ranges          large weights of which only the blocks are fetched that are read
cache           local copies, bounded; what every reader of a path calls: `local_file`, `local_directory`
outputs         files and directories that are written here and published when they are complete

Readers call `cache.local_file` on a path and open what it returns; writers go through `storage.files`, which writes to
the cache's disk and publishes what is complete.
"""
