"""What a model of several towers offers to whoever lets them exchange: a forward in lockstep, and what is in a batch.

A composite model describes the running batch in a `LockstepBatch` and calls its towers through `run_towers`, nothing
more. Whoever puts adapters into the towers sets the model's `make_exchange`; without it the towers run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from .batch import LockstepBatch
from .coroutines import run_in_lockstep


T = TypeVar("T")
Exchange = Callable[[int, dict[str, Any]], Mapping[str, Any]]
MODALITIES = ("vision", "audio", "text")


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
    """By modality, the towers of a composite model that meet: all, or those that its class names as `meeting`.

    Raises:
        ValueError: if there are fewer than two.
    """
    meeting = getattr(type(composite), "meeting", MODALITIES)
    towers = {modality: getattr(composite, f"{modality}_model", None) for modality in meeting}
    present = {modality: tower for modality, tower in towers.items() if isinstance(tower, nn.Module)}
    if len(present) < 2:
        expected = [f"`{modality}_model`" for modality in meeting]
        raise ValueError(
            f"LSTTA needs two or three towers that meet, but the {type(composite).__name__} has "
            f"{', '.join(present) or 'none'} of {', '.join(expected[:-1])} and {expected[-1]}."
        )
    return present
