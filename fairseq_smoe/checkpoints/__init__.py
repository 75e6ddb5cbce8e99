"""Checkpoint files: written whole, read safely, their experts in parts where many processes train."""
