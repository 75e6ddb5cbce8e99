"""The paper's benchmarks: their definitions, scales, commands and run folders."""
