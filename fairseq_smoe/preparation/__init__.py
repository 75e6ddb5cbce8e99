"""Turning raw parallel text into a folder that ``fairseq-train --task smoe_translation`` reads."""
