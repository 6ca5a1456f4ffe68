"""What a model of several towers offers to whoever lets them exchange: a forward in lockstep, and what is in a batch.

A composite model describes the running batch in a `LockstepBatch` and calls its towers through `run_towers`, nothing
more. Whoever puts adapters into the towers sets the model's `make_exchange`; without it the towers run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .coroutines import run_in_lockstep
from .layouts import Layout, layout_of, step_mask, token_mask


T = TypeVar("T")
Exchange = Callable[[int, dict[str, Any]], Mapping[str, Any]]
MODALITIES = ("vision", "audio", "text")


@dataclass
class TowerBatch:
    """What a tower's blocks aren't passed of the batch that they work on.

    Args:
        modality: `"vision"`, `"audio"` or `"text"`.
        tower: the tower.
        size: number of samples.
        layout: of its hidden states in this batch.
        mask: `(batch, input steps)`, bool, true where the tower's input is real; None where all of it is.
    """

    modality: str
    tower: nn.Module
    size: int
    layout: Layout
    mask: Tensor | None = None
    _masks: dict[tuple[int, int], tuple[Tensor | None, Tensor | None]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, modality: str, tower: nn.Module, size: int, steps: int, mask: Tensor | None = None) -> TowerBatch:
        """Describe a tower's input.

        Args:
            modality: `"vision"`, `"audio"` or `"text"`.
            tower: the tower.
            size: number of samples.
            steps: steps of the tower's input, padding included.
            mask: `(batch, input steps)`, true or not 0 where real; None where all of it is.

        Raises:
            ValueError: if the mask has another shape, or the tower can't take such an input.
        """
        if mask is not None and mask.shape != (size, steps):
            raise ValueError(
                f"The mask of the {modality} tower has the shape {tuple(mask.shape)}, expected {(size, steps)}: it "
                "goes over the steps of the tower's own input."
            )
        layout = layout_of(tower, modality, steps)
        return cls(modality, tower, size, layout, None if mask is None else mask.bool())

    def split(self, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`(batch, steps, tokens of a step, dim)` of the tokens in time and `(batch, tokens, dim)` of the others."""
        return self.layout.split(hidden, self.size)

    def join(self, timed: Tensor | None, untimed: Tensor | None, shape: torch.Size) -> Tensor:
        """The inverse of `split`."""
        return self.layout.join(timed, untimed, shape)

    def masks(self, timed: Tensor | None, untimed: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Which of what `split` gave is real.

        Tokens that aren't in time, but of a modality that is, have seen everything: those before the tokens in time
        count as real where no step of their sample is padding; where there are no others, where any step is real.

        Returns:
            `(batch, steps)` of the tokens in time and `(batch, tokens)` of the others, bool, true where real; None
            where all is, or where there are no such tokens.
        """
        if self.mask is None:
            return None, None
        shape = (0 if timed is None else timed.shape[1], 0 if untimed is None else untimed.shape[1])
        if shape not in self._masks:
            self._masks[shape] = (
                None if timed is None else step_mask(self.tower, self.mask, shape[0]),
                None if untimed is None else self._untimed_mask(self.mask, shape[1]),
            )
        return self._masks[shape]

    def _untimed_mask(self, mask: Tensor, tokens: int) -> Tensor:
        if self.layout.order == "words":
            return token_mask(mask, tokens)
        real = mask.any(1) if self.layout.order == "none" else mask.all(1)
        return real[:, None].expand(-1, tokens)


@dataclass
class LockstepBatch:
    """A batch on its way through the towers of a composite model; made anew for each forward.

    Args:
        size: number of samples.
        towers: by name, those that take part: a modality may be absent.
    """

    size: int
    towers: dict[str, TowerBatch]


def run_towers(model: nn.Module, calls: Mapping[str, Callable[[], T]], batch: LockstepBatch) -> dict[str, T]:
    """Run the towers of a composite model, in lockstep if adapters let them exchange.

    A composite model of your own takes part by calling its towers, which are its `vision_model`, `audio_model` and
    `text_model`, through this in its `forward`, and by saying so with a class attribute:

    ```python
    class VideoAndText(nn.Module):
        make_exchange = None

        def forward(self, pixel_values, input_ids, attention_mask):
            batch = LockstepBatch(
                size=len(input_ids),
                towers={
                    "vision": TowerBatch.of("vision", self.vision_model, len(input_ids), pixel_values.shape[1]),
                    "text": TowerBatch.of("text", self.text_model, *input_ids.shape, mask=attention_mask),
                },
            )
            calls = {
                "vision": lambda: self.vision_model(pixel_values.flatten(0, 1)),
                "text": lambda: self.text_model(input_ids, attention_mask),
            }
            outputs = run_towers(self, calls, batch)
    ```

    Args:
        model: the composite model. If a tuner has set its `make_exchange`, this is called with the batch, and the
            towers run in lockstep with what it returns as their exchange.
        calls: by name, what runs a tower.
        batch: describes the running batch to the exchange.

    Returns:
        By name, what each tower returned.
    """
    make_exchange: Callable[[LockstepBatch], Exchange] | None = getattr(model, "make_exchange", None)
    if make_exchange is None:
        return {name: call() for name, call in calls.items()}
    return run_in_lockstep(calls, make_exchange(batch))


def find_composite(model: nn.Module) -> tuple[str, Any]:
    """The part of a model that runs towers in lockstep, and its name.

    Its class has an attribute `make_exchange`, which is None until a tuner sets it on the model: to a function of a
    `LockstepBatch` that gives the exchange, which is no closure, so that the model can be copied and pickled.

    Raises:
        ValueError: if there is none.
    """
    for name, module in model.named_modules():
        if hasattr(type(module), "make_exchange"):
            return name, module
    raise ValueError(
        f"LSTTA needs towers that can run in lockstep, but a {type(model).__name__} has none: build a "
        "peft_read.TrimodalModel of your towers. A composite model of your own takes part if its forward calls the "
        "towers through peft_read.lockstep.run_towers and its class says so by `make_exchange = None`; the towers are "
        "its attributes `vision_model`, `audio_model` and `text_model`."
    )


def towers_of(composite: nn.Module) -> dict[str, nn.Module]:
    """By modality, the towers of a composite model.

    Raises:
        ValueError: if there are fewer than two.
    """
    towers = {modality: getattr(composite, f"{modality}_model", None) for modality in MODALITIES}
    present = {modality: tower for modality, tower in towers.items() if isinstance(tower, nn.Module)}
    if len(present) < 2:
        raise ValueError(
            f"LSTTA needs two or three towers, but the {type(composite).__name__} has {', '.join(present) or 'none'} "
            "of `vision_model`, `audio_model` and `text_model`."
        )
    return present
