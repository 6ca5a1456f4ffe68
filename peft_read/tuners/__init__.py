"""What READ and LSTTA share as methods of PEFT.

`registration.py` makes them members of PEFT's registry. `base.py` has the base classes of their tuners and layers:
mixed batches, strict loading, what can't be merged. `checks.py` validates single fields of a configuration, and
`sharding.py` names the blocks that FSDP shards.
"""
