"""PVLA, partial video-language alignment: the loss of the READ paper (arXiv 2312.06950), and Trainers with it.

- The loss: `naive.py` is partial optimal transport as it is defined, `transport.py` solves it for a batch
  (`transport_kernel.py` on CUDA), `contrast.py` compares a batch's pairs, `loss.py` makes a loss of both.
- The states: `source.py` says what a source of states is, `sequences.py` has what those share that read video and text
  as one sequence, which `block_states.py` and `input_states.py` are; `towers.py` has those of dual encoders;
  `states.py` chooses. In a sequence `tokens.py` says which tokens are video and which are text, `words.py` which text
  is words, `frames.py` which video tokens are one frame.
- Training: `arguments.py` are the options, `alignment.py` what is aligned and how, `trainer.py` the Trainers.
  `pairs.py` draws pairs without labels, `gradient_share.py` weighs, `step_mean.py` is the mean over a step's labels.
- Looking: `measuring.py` measures a step, `health.py` whether the alignment learns anything; `metrics.py` averages for
  the log, `trained.py` says what could learn, `picture.py` draws transport plans.
"""
