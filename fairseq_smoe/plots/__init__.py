"""Pictures of requested capacity, experts and training curves, one module each."""
