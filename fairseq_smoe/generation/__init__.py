"""Changes to fairseq's programs that translate: fairseq-generate and fairseq-interactive."""
