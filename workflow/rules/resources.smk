"""What a job asks for, so that a domain of 500 queries and one of 5 million both fit, and a second attempt gets more.

Memory is a power of two in MiB, for few distinct sizes of nodes. Every rule has threads, mem_mb, runtime (minutes) and
disk_mb; those that compute on a GPU also gpu, gpu_manufacturer and gpu_memory_mb. What an
executor wants beside that (a partition, a machine type) is in its profile. What was measured of the growth with the
inputs is in docs/clusters.md.
"""

from math import ceil, log2


def memory(least, per_input_mb=0):
    """Return a function for the memory of a job in MiB, which doubles with each attempt."""

    def resource(wildcards, input, attempt):
        wanted = max(least, 1000 + per_input_mb * input.size_mb)
        return 2 ** ceil(log2(wanted)) * 2 ** (attempt - 1)

    return resource


def minutes(least, per_input_mb=0):
    """Return a function for the longest that a job may take, which grows with each attempt."""

    def resource(wildcards, input, attempt):
        return ceil(least + per_input_mb * input.size_mb) * attempt

    return resource


def disk(least, per_input_mb=3):
    """Return a function for the scratch space of a job in MB: for its inputs, where they are copied, and its outputs."""

    def resource(wildcards, input, attempt):
        return ceil(least + per_input_mb * input.size_mb) * attempt

    return resource
