"""Grounding on the public benchmarks' features: their files, their metrics, and a model with span heads."""
