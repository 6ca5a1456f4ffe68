"""PVLA, partial video-language alignment: the loss of the READ paper (arXiv 2312.06950), and Trainers with it.

`transport.py` solves partial optimal transport for a batch (`transport_kernel.py` on CUDA), `loss.py` makes a loss of
it. `states.py` finds the states of frames and words in a running model, `trainer.py` adds the loss to the task's, with
the options of `arguments.py`. `health.py` measures whether the alignment learns anything; `picture.py` draws transport
plans.
"""
