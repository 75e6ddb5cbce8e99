"""How much is translated at a time, unless the user asks for something else."""

CPU_TOKENS = 12000  # source tokens of a batch; fewer, and many more, were slower
GPU_TOKENS = 65536  # to begin with
MOST_CPU_PROCESSES = 8  # each needs memory for its batches
