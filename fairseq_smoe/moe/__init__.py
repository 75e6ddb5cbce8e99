"""The mixture-of-experts layer; imports torch and nothing of fairseq."""
