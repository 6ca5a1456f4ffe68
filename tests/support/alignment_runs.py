"""Runs of PVLA's Trainers on tiny models, and what is compared of them."""

import copy

import torch
from alignment import alignment, collate, forward, steps_logged, trainer_of, weights
from alignment_batches import SAMPLES, marked, places


def named(rows=SAMPLES):
    return marked(rows, embedded=False, videos="some")


def trained(case, folder, batch=SAMPLES, **options):
    """The logs and the weights of a run over the data."""
    trainer = trainer_of(case, case.model(), folder, batch=batch, **options)
    trainer.train()
    return steps_logged(trainer), weights(trainer.model)


def read_gradients(case, model, examples):
    """Norms of both losses' gradients on READ's weights, by hand."""
    model = copy.deepcopy(model).train()
    read = [p for name, p in model.named_parameters() if ".read_" in name and p.requires_grad]
    task, pairs = forward(case, model, collate(case, examples))
    losses = (task, alignment(pairs))
    grads = (torch.autograd.grad(loss, read, retain_graph=True, allow_unused=True) for loss in losses)
    return [float(torch.cat([g.flatten() for g in some if g is not None]).norm()) for some in grads]


def without_video(example):
    return example | {"video_token_mask": places()}
