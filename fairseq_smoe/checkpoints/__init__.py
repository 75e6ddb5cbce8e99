"""Checkpoint files: written atomically, read safely, in parts if ranks share experts."""
