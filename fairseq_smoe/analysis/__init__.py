"""Counting what the experts of a trained model do in a pass over a data set, written as CSV."""
