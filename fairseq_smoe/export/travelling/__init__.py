"""Files that are copied into an exported folder and run there: they import torch, transformers and
sentencepiece, and nothing of this package."""
