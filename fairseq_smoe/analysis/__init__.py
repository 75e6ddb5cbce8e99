"""What the experts of a trained model do: counted in a pass over a data set, written as CSV."""
