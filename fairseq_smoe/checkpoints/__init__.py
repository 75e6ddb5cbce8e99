"""Checkpoint files: written whole, read safely, in parts where many processes train."""
