"""The shape of embeddings, and what it says: geometry, likeness of models, thresholds, associations.

Functions over arrays; importing this package imports nothing heavy.
"""
