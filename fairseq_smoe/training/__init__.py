"""What this project changes in fairseq's training loop: repairs, checkpoints, shards, signals."""
