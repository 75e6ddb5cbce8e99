"""What this project changes in fairseq's training loop: fixes, checkpoints, sharding, signals."""
