"""What embeddings look like, and what that says: geometry, likeness of models, thresholds, associations.

Functions over arrays; importing this package imports nothing heavy.
"""
