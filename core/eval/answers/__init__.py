"""Answers of a model to a file of questions, in the formats that other repositories' judges read."""
