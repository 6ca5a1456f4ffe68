"""How PVLA teaches a new projection: `rows.py` are the ways to train, `results.py` what they gave."""
