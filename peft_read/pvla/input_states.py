"""States of one sequence as it enters the blocks, before its tokens have met."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .sequences import SequenceStates, Stopped, arguments_by_name, block_of, carries_states
from .source import Batch, VideoTextStates
from .trained import modules_that_project, reaches_trained


class InputStates(SequenceStates):
    """The tokens as they enter the first tower that READ adapts, before any of its blocks: they haven't met yet.

    Projected video tokens against the embeddings of words. Where the tower itself puts the video among the words, as
    Kosmos-2 does, they are what enters its first block.

    Args:
        model: the adapted model.

    Raises:
        ValueError: if no tower that reads text is adapted by READ.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "inputs")
        self.model = model
        self.first_block = _first_of_its_row(model, block_of(next(iter(self.layers))))
        self._inside = False  # the tower, which was given ids
        self._features = False  # whether the tower was given features, too

    def listen(self) -> list[RemovableHandle]:
        """Record what enters the first block, whether that was given or looked up."""
        self._inside = False
        return [
            *super().listen(),
            self.tower.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.first_block.register_forward_pre_hook(self._enter_block, with_kwargs=True),
        ]

    def entered(self) -> Tensor | None:
        """What was recorded."""
        return next(iter(self.recorded.values()), None)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = arguments_by_name(module, args, kwargs)
        given = call.get("inputs_embeds")
        self._inside = given is None
        self._features = any(carries_states(*named) for named in call.items())
        if given is not None:
            self._keep_input(given)

    def _embed(self, module: nn.Module, args: Any, output: Tensor) -> None:
        super()._embed(module, args, output)
        # Else these are the embeddings of words alone, before video tokens take their places.
        if self._inside and not self._features:
            self._inside = False
            self._keep_input(output)

    def _enter_block(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # A tower that has no module for embeddings, or puts features among them.
        if self._inside:
            self._inside = False
            self._keep_input(args[0] if args else next(iter(kwargs.values())))

    def _keep_input(self, states: Tensor) -> None:
        if self.counts():
            self.recorded["the input of the blocks"] = states
        if self._stops:
            raise Stopped

    def states(self, model: nn.Module, batch: Batch, outputs: Any) -> VideoTextStates:
        """Video and words before they met."""
        return self.in_sequence(batch, met=False)

    def check(self, example: Batch, model: nn.Module) -> None:
        """Raise a `ValueError` if the masks don't fit, or nothing before the blocks is trained."""
        super().check(example, model)
        if not self.masks(example)[0].any():  # a sample without video says nothing
            return
        try:
            with torch.enable_grad(), self.recording():
                self.run(model, example)
                states = self.states(model, example, None)
        except Exception:  # what training itself will stumble over
            return
        if not (reaches_trained(states.video) or reaches_trained(states.words)):
            raise ValueError(self.untrained())

    def untrained(self) -> str:
        """Why there is no gradient, and what to train."""
        width = None if self.embeddings is None else getattr(self.embeddings, "embedding_dim", None)
        names = modules_that_project(self.model, self.tower, width)
        named = f"modules_to_save={names}" if names else "the names of what makes the video tokens as modules_to_save"
        return (
            f"pvla_states='inputs' aligns video tokens with words as they enter {type(self.tower).__name__}, but "
            "nothing that comes before is trained. Train what projects the video into the space of words: give "
            f"ReadConfig {named}."
        )


def _first_of_its_row(model: nn.Module, block: str) -> nn.Module:
    """The first of the blocks of which this is one: adapters may begin at a later one."""
    own, (row, _, number) = model.get_submodule(block), block.rpartition(".")
    first = getattr(model.get_submodule(row), "0", None) if number.isdigit() else None
    return first if type(first) is type(own) else own
