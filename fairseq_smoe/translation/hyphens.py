"""Language codes with a hyphen, which the names of fairseq's files have no place for."""

import os
import re

HYPHENS = (
    "a language code cannot have a hyphen, which joins source and target; write it with an "
    "underscore (pt_br), in the names of the data's and dictionaries' files as well"
)


def explain_hyphens(folders, split):
    """The text of an error about a file ``SPLIT.A-B.A.idx`` whose languages cannot be told apart;
    None if the folders have none."""
    pattern = re.compile(rf"{re.escape(split)}\.[^.-]+(-[^.-]+){{2,}}\.[^.]+\.idx")
    for folder in folders:
        for name in sorted(os.listdir(folder)):
            if pattern.fullmatch(name):
                return f"{os.path.join(folder, name)}: {HYPHENS}"
    return None
