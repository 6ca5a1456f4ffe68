"""The masked scan of a recurrent cell over time: functions of tensors, which know neither PEFT nor any model.

`naive.py` says what it is, step by step, and everything else here has to equal it. `scan.py` has `recurrent_scan`,
which others call, and `module.py` the same as a module; `cells.py` says what a cell is. `sequences.py` runs it over
valid steps alone (`compaction.py`) and over packed rows. `dispatch.py` chooses who runs it: torch's operations
parallel in time on CPU (`chunks.py`, `chunked_cpu.py`), Triton's kernel on CUDA (`chunked_triton.py`,
`triton_chunks.py`, `triton_steps.py`), torch's own kernels else. Compilers see one operator (`operator.py`), ONNX its
own (`onnx.py`). `packed.py` keeps the states after every step.
"""
