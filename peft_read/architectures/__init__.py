"""What is known of model architectures: functions that read a model's structure, and one table of exceptions.

`targets.py` finds the outputs of feed-forward parts, which READ adapts; `blocks.py` finds the blocks after which
LSTTA's towers meet. Both judge by structure. What structure doesn't tell of a model type stands in `exceptions.py`: a
new model type is an entry there, or nowhere.
"""
