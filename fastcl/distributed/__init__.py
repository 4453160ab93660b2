"""Statistics and losses over all ranks of a process group, as if one process held every rank's rows.

Each rank has its own queries and its own shard of the keys. Either it gathers all shards, or the
shards travel around a ring and each rank merges the statistics of its queries over them. Gradients
are those of the sum of what the ranks returned: under the averaging of DistributedDataParallel,
those of one process.
"""
