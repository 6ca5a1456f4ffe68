"""A model of up to three pretrained towers, for pictures, sound and text. It runs, trains and saves without adapters.

`modeling.py` is the model and `configuration.py` its config. With a head: `heads.py` classifies clips, frames and
choices (its losses are in `losses.py`), `generation.py` writes, `retrieval.py` finds clips by sentences. `loading.py`
gets towers with their weights, `towers.py` knows how each is called, `features.py` stands for a tower whose outputs
are on disk. `inputs.py` checks what a model is called with, `fusion.py` makes one vector of the towers' outputs.
`processing.py` makes a batch of whatever people have: `pictures.py` and `sounds.py` take each kind of it, `media.py`
reads files, `options.py` checks numbers such as rates. `picture.py` draws what counted in a clip.
"""
