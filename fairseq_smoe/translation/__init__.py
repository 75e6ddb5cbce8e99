"""What is registered with fairseq: model, task, criterion and their data."""
