"""Which rows of a packed vision tower are which frame: patches of all images and videos lie in one axis there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..architectures.targets import owner_of
from . import arguments as names
from .call import RunningForward
from .context import ForwardContext


class FrameRows(NamedTuple):
    """The rows of a packed tower, by place and frame.

    Attributes:
        groups: row numbers `(places, frames)`: a place in a video of that many frames, and the row that it has in each
            of them. One tensor for all videos of as many frames, images being videos of one.
        back: `(rows,)`, where each row is among those of all groups.
    """

    groups: list[Tensor]
    back: Tensor


def frame_rows(grid: Sequence[Sequence[int]], merged: int = 1) -> FrameRows:
    """Row numbers of packed patches, of which each frame is a run and each video is a run of frames.

    Within a frame the patches may lie in any order that is the same in all frames of its video: row by row, by blocks
    that are merged later, or by windows.

    Args:
        grid: frames, rows and columns of patches of each image or video.
        merged: patches of a frame that a row stands for.

    Returns:
        Their rows, on the CPU.

    Example:
        >>> frame_rows([(3, 1, 2), (1, 2, 2)]).groups
        [tensor([[0, 2, 4],
                [1, 3, 5]]), tensor([[6],
                [7],
                [8],
                [9]])]
    """
    groups: dict[int, list[Tensor]] = {}
    first = 0
    for frames, height, width in grid:
        places = height * width // merged
        rows = torch.arange(first, first + frames * places)
        groups.setdefault(frames, []).append(rows.view(frames, places).T)
        first += frames * places
    stacked = [torch.cat(group) for group in groups.values()]
    return FrameRows(stacked, torch.cat([group.flatten() for group in stacked]).argsort())


def takes_grid(owner: nn.Module) -> bool:
    """Whether a model is a packed vision tower that is told the frames of its videos."""
    return names.GRID in _parameters(type(owner).forward)


def is_packed(model: nn.Module, name: str) -> bool:
    """Whether a module's output has the tokens of all samples in one axis, as in packed towers of pictures and sound.

    Args:
        model: the model that contains the module.
        name: the module's name in `model`.
    """
    if takes_grid(owner_of(model, name)):
        return True
    parts = name.split(".")
    number = next((i for i in range(len(parts) - 2, -1, -1) if parts[i].isdigit()), None)
    if number is None:
        return False
    block = model.get_submodule(".".join(parts[: number + 1]))
    edges = (_parameters(type(module).forward).get(names.EDGES) for module in block.modules())
    # Where they are optional the same blocks take a batch.
    return any(edge is not None and edge.default is inspect.Parameter.empty for edge in edges)


def frames_of(
    running: RunningForward, around: Sequence[ForwardContext], rows: Tensor, merged: int, module_name: str
) -> FrameRows:
    """The rows of a packed tower's running forward by frame.

    Args:
        running: the forward of the tower.
        around: the contexts of the models around it, the outermost first.
        rows: the module's output, `(rows, features)`.
        merged: patches that the tower merges into one at its end.
        module_name: name of the adapted module.

    Returns:
        Their rows, on the device of `rows`.

    Raises:
        ValueError: if the tower wasn't told its frames, or has other rows than that.
    """
    count, device = rows.shape[0], rows.device
    # `once` also for checkpoints, which compute a part of the tower again after the models around it have ended.
    return running.once(
        ("frames", count, device), lambda: _find_frames(running, around, count, merged, module_name, device)
    )


@torch.compiler.disable
def _find_frames(
    running: RunningForward,
    around: Sequence[ForwardContext],
    count: int,
    merged: int,
    module_name: str,
    device: torch.device,
) -> FrameRows:
    given = running.call.grids.get(names.GRID)
    if given is None:
        raise ValueError(
            f"READ at {module_name} recurs over frames, but its tower was called without `{names.GRID}`, which tells "
            "how many frames each video has. Pass it."
        )
    grid = _of_whole_videos(given.tolist(), around, module_name)
    patches = sum(frames * height * width for frames, height, width in grid)
    for share in {1, merged}:
        if count * share == patches and all(height * width % share == 0 for _, height, width in grid):
            found = frame_rows(grid, share)
            return FrameRows([group.to(device) for group in found.groups], found.back.to(device))
    raise ValueError(
        f"READ at {module_name} recurs over frames, but this module's output has {count} rows where `{names.GRID}` "
        f"tells of {patches} patches. Target modules whose rows are the patches of the images and videos."
    )


def _of_whole_videos(grid: list[list[int]], around: Sequence[ForwardContext], module_name: str) -> list[list[int]]:
    """The grid, or the videos of which its images are the frames: GLM-4V hands its tower every frame as an image."""
    if any(frames != 1 for frames, _, _ in grid):
        return grid
    for context in reversed(around):
        call = running.call if (running := context.running()) is not None else None
        given = [] if call is None else [g.tolist() for name, g in call.grids.items() if name != names.GRID]
        if given:
            fitting = [one for one in given if [[1, h, w] for t, h, w in one for _ in range(t)] == grid]
            if len(fitting) > 1 and fitting[0] != fitting[1]:
                raise ValueError(
                    f"READ at {module_name} can't tell images from the frames of videos: both have the same sizes, "
                    "and the tower is given each frame as an image. Pass them in calls of their own."
                )
            return fitting[0] if fitting else grid
    return grid


@functools.cache
def _parameters(method: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(method).parameters)
