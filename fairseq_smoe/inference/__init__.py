"""Translating text: the Python API, packed models, and files of any length."""
