"""From raw parallel text to a folder that ``fairseq-train --task smoe_translation`` reads."""
