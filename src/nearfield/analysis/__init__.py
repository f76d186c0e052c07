"""The looks of embeddings, and what they say: geometry, likeness of models, thresholds, associations.

Functions over arrays; importing this package imports nothing heavy.
"""
