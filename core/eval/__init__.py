"""Evaluation of models on tasks of lm-evaluation-harness, on the IQ suites, and by bits per byte."""
