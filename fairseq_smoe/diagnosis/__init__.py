"""Whether this machine trains and translates: what is installed, its devices, and a self-test."""
