"""A model of up to three pretrained towers, for pictures, sound and text. It runs, trains and saves without adapters.

`modeling.py` is the model and `heads.py` the same with a classifier, for a clip or for each frame (their losses are in
`losses.py`); `configuration.py` is its config. `towers.py` loads single towers and knows how each is called;
`fusion.py` makes one vector of their outputs. `processing.py` makes a batch from files, waveforms and sentences, which
`media.py` reads.
"""
