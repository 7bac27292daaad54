"""IQ suites of the FLM-101B paper (arXiv 2309.03852, section 5): seeded generators and lm-evaluation-harness tasks.

What the paper does not say (alphabets, lengths, layouts, shots a label) is an option whose default is ours.
"""
