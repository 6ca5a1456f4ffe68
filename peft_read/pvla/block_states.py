"""States of one sequence as blocks give them, where each token has seen all others."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .contrast import sentence_keys
from .sequences import SequenceStates, Stopped, active_adapters, arguments_by_name, block_of, carries_states
from .source import Batch, VideoTextStates


class BlockStates(SequenceStates):
    """The tokens as the blocks that READ adapts give them, where each has seen all others.

    Args:
        model: the adapted model; in an encoder-decoder model, the encoder's blocks are meant.
        which: `"last_block"`: the output of the last adapted block (the paper's figure); `"all_blocks"`: of every one,
            side by side in the batch; `"bottleneck"`: the last adapter's low-dimensional states.

    Raises:
        ValueError: if no block with text in it is adapted by READ.
    """

    met = True

    def __init__(self, model: nn.Module, which: str) -> None:
        super().__init__(model, which)
        names = list(dict.fromkeys(block_of(name) for name in self.layers))
        if which == "bottleneck":
            name, layer = list(self.layers.items())[-1]
            self.listened = {name: layer.activation[active_adapters(layer)[0]]}
        else:
            self.listened = {
                name: model.get_submodule(name) for name in (names if which == "all_blocks" else names[-1:])
            }
        self.blocks = len(self.listened)
        self._call: dict[str, Any] = {}  # what the tower was given

    def listen(self) -> list[RemovableHandle]:
        """Record what the listened modules return, and what the tower is given."""
        handles = super().listen()
        handles += [m.register_forward_hook(partial(self._keep_output, n)) for n, m in self.listened.items()]
        handles.append(self.tower.register_forward_pre_hook(self._keep_call, with_kwargs=True))
        return [*handles, self.tower.register_forward_hook(self._leave)]

    def _keep_output(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self.counts():
            self.recorded[name] = output if isinstance(output, Tensor) else output[0]

    def _keep_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.counts():
            self._call = arguments_by_name(module, args, kwargs)

    def entered(self) -> Tensor | None:
        """Embeddings that the tower was called with."""
        return self._call.get("inputs_embeds")

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stops:  # before heads
            raise Stopped

    @contextmanager
    def recording(self) -> Iterator[None]:
        """As of the parent; the tower's arguments are dropped, too."""
        try:
            with super().recording():
                yield
        finally:
            self._call = {}

    def states(self, model: nn.Module, batch: Batch, outputs: Any) -> VideoTextStates:
        """Video and words of each recorded block, which have met."""
        return self.in_sequence(batch, met=True)

    def mismatched(self, states: VideoTextStates, batch: Batch) -> VideoTextStates | None:
        """Sentences beside other samples' videos, read anew by the tower: block states carry their own video along.

        A sample gets the video tokens of the next one with as many of them, at the places of its own; samples without
        such a partner, or with one of the same words, have no valid frame. None if the tower can't be called with
        embeddings, or is given more than them that is a sample's own.
        """
        call = dict(self._call)
        ids, embedded = call.pop("input_ids", None), call.pop("inputs_embeds", None)
        takes_embeddings = "inputs_embeds" in inspect.signature(type(self.tower).forward).parameters
        if not takes_embeddings or any(carries_states(*named) for named in call.items()):
            return None
        if embedded is None:
            if ids is None or self.embeddings is None:
                return None
            embedded = self.embeddings(ids)
        video, _ = self.masks(batch)
        words = self.words(batch)
        sentences = range(len(video)) if words is None else map(tuple, sentence_keys(*words).tolist())
        partners = _next_with_as_many(video.sum(1).tolist(), list(sentences))
        mixed = embedded.clone()
        for own, other in enumerate(partners):
            if other is not None:
                mixed[own, video[own]] = embedded[other, video[other]]
        own_recorded, with_grad = dict(self.recorded), self._with_grad
        self._with_grad = False
        try:
            self.tower(inputs_embeds=mixed, **call)
            found = self.in_sequence(batch, met=True)
        finally:
            self.recorded, self._with_grad = own_recorded, with_grad
        has_partner = torch.tensor([other is not None for other in partners], device=video.device)
        assert found.frame_mask is not None
        return found._replace(frame_mask=found.frame_mask & has_partner.repeat(self.blocks)[:, None])


def _next_with_as_many(counts: list[int], sentences: list[Any]) -> list[int | None]:
    """For each sample the next one, in a circle, of another sentence with as many video tokens, if it has any."""
    rows = range(len(counts))
    orders = [[*rows[row + 1 :], *rows[:row]] for row in rows]
    return [
        next((i for i in order if counts[i] == counts[row] > 0 and sentences[i] != sentences[row]), None)
        for row, order in zip(rows, orders, strict=True)
    ]
