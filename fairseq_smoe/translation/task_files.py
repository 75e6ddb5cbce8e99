"""Names of the files that data preparation writes and the task reads."""

LANGS_FILE = "langs.txt"  # one language per line, in the order of their tokens in the vocabulary
