"""fairseq's training loop: repairs, checkpoints that survive, shards, signals."""
