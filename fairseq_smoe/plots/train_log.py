"""Reading training curves from fairseq's JSON log."""

import json

# quantity -> (kind of record, names of which the first present one is used, title of its plot)
QUANTITIES = {
    "train_loss": ("train_inner", ("nll_loss", "loss"), "Training loss, bits per token"),
    "valid_loss": ("valid", ("valid_nll_loss", "valid_loss"), "Validation loss, bits per token"),
    "valid_bleu": ("valid", ("valid_bleu",), "Validation BLEU"),
    "balance_loss": ("train_inner", ("moe_gate_loss",), "Balance loss, 1 is even load"),
    "encoder_capacity": (
        "train_inner",
        ("encoder_requested_capacity",),
        "Requested capacity, encoder",
    ),
    "decoder_capacity": (
        "train_inner",
        ("decoder_requested_capacity",),
        "Requested capacity, decoder",
    ),
    "encoder_experts": (
        "train_inner",
        ("encoder_experts_per_token",),
        "Experts per token, encoder",
    ),
    "decoder_experts": (
        "train_inner",
        ("decoder_experts_per_token",),
        "Experts per token, decoder",
    ),
}


def read_log(path):
    """``{kind: {updates: record}}`` of kinds train_inner, train, valid, ..., in order.

    A training that is resumed from a checkpoint repeats some updates. What was logged of them
    before does not belong to the model, and is dropped.
    """
    records = {}
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            record = _parse(line)
            kind, updates = _kind_and_updates(record)
            if updates is None:
                continue
            updates = int(float(updates))
            known = records.setdefault(kind, {})
            while known and next(reversed(known)) >= updates:
                known.popitem()
            known[updates] = record
    return records


def _parse(line):
    """The record in a line, or {}. In --log-file a line is the record alone; in the output of
    fairseq-train, time and place come first."""
    start = line.find("{")
    if start < 0:
        return {}
    try:
        record = json.loads(line[start:])
    except ValueError:  # not a record, or incomplete because the training was killed
        return {}
    return record if isinstance(record, dict) else {}


def _kind_and_updates(record):
    """Names of all records but train_inner begin with their kind: ``valid_num_updates``."""
    if "num_updates" in record:
        return "train_inner", record["num_updates"]
    ending = "_num_updates"
    for name, value in record.items():
        if name.endswith(ending):
            return name[: -len(ending)], value
    return None, None


def curves(path, valid="valid"):
    """``{quantity: [(updates, value)]}`` of :data:`QUANTITIES` that the log holds.

    Args:
        valid: name of the validation set.
    """
    records = read_log(path)
    found = {}
    for quantity, (kind, names, _) in QUANTITIES.items():
        if kind == "valid":
            kind = valid
            names = [name.replace("valid_", f"{valid}_", 1) for name in names]
        points = []
        for updates, record in records.get(kind, {}).items():
            value = next((record[name] for name in names if name in record), None)
            if value is not None:
                points.append((updates, float(value)))
        if points:
            found[quantity] = points
    return found
