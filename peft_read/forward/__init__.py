"""What an adapted layer must know of the forward that runs around it: padding, packing, caches, the axis of time.

A recurrence over tokens is right only if it knows which tokens are padding, where one packed sequence ends, and which
tokens were seen before. A layer isn't passed these, so hooks on the model that owns it note what a call was given
(`ForwardContext`), in a record that nobody changes (`ForwardCall`). What follows is worked out by functions of that
record: `padding_of`, `starts_of` and `state_before`. What a forward leaves for the next one lies beside the KV cache
(`leave_states`); where there is none, it leaves nothing.

The files: `context.py` has the hooks, `arguments.py` the names of arguments, `call.py` the record. `padding.py` reads
which tokens are valid, `packing.py` where a sequence ends, `frames.py` which rows of a packed vision tower are one
frame, `decoding.py` which state to start from and to leave, and `states_beside_cache.py` keeps the states beside a KV
cache. `description.py` is what a caller says himself.

Whatever can't be known is refused, with the sentence that mends it; `describe_tokens` says it explicitly. The page
`examples/inputs.md` lists what is understood and what is refused.
"""
