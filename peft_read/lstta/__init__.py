"""LSTTA, adapters between frozen encoders of pictures, sound and text (Liu et al., ACM MM 2023, arXiv 2308.14274).

`interaction.py` has the mathematics, as functions of bottleneck tensors: which frames matter, and what the towers tell
each other within `windows.py`'s windows of time, which `clock.py` brings to seconds; `naive.py` is the latter as it is
defined. `layer.py` wraps a block of a tower; `adapter.py` has its weights, into the bottleneck and out of it;
`exchange.py` is what happens when the blocks of one level have all arrived. `config.py` has every field that a user
sets, `model.py` puts the layers into the towers. The towers advance together by the room `lockstep`.
"""
