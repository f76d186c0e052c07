"""Modules that sentence-transformers does not have: their file is copied into the folder of a model that uses them."""
