"""Localisation of the first wrong operator of two records: walk, replay and shrinking."""
