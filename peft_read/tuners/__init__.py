"""What READ and LSTTA share as methods of PEFT.

- `registration.py`: makes them members of PEFT's registry; `overrides.py`: how methods of PEFT and transformers do
  something of their own for them.
- `config.py`: the fields that both configurations have; `checks.py`: whether single fields are right; `patterns.py`:
  a bound on the time that regular expressions take.
- `base.py` and `layer.py`: the base classes of their tuners and layers, which can't be merged; `mixed.py`: whole
  modules in batches with an adapter per sample.
- `loading.py`: loading by PEFT and by transformers, as a whole or not at all; `fitting.py`: whether weights fit;
  `undo.py`: taking a refused load or injection back; `inner.py`: adapters of other methods inside of an adapted model.
- `offloading.py`: bases that accelerate has offloaded; `sharding.py`: the blocks that FSDP shards.
"""
