"""Published methods beyond what an ordinary run needs: one file each, with its settings, its code, its paper and what is ours.

A file is imported when a recipe or a command names it, and may import torch at its top; nothing of the library below the
pipeline imports one. The tables of kinds of the parts that they extend name them.
"""
