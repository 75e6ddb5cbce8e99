"""What is registered with fairseq: model, task and criterion, with their options and data."""
