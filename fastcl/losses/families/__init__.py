"""Losses that a backend may compute as a whole: their arguments as records, and their formulas.

Each family serves one objective or several; backends and ops know families, not objectives.
"""
