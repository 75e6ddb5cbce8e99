"""Making trained models into others."""
