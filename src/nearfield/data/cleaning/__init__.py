"""Cleaning: steps that take examples and texts out of a store while it is built, each counted and written down."""
