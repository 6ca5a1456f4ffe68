"""READ, the recurrent adapter (Nguyen et al., AAAI 2024, arXiv 2312.06950).

`config.py` has every field that a user sets. `layer.py` has all of the mathematics: it wraps a module and adds
`up(act(recurrence(down(y))))` to its output y. `model.py` decides which modules are wrapped, and refuses those that
can't be. The recurrence itself is the room `recurrence`; what a layer knows of masks, packing and caches comes from
`forward`.
"""
