"""Tables of scores: collected from evaluation folders, laid out, and written in three formats."""
