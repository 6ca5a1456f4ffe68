"""Several models' forwards advance together, level by level, so that they can exchange what they have found so far.

Each tower's own, unmodified forward runs in a greenlet, a coroutine that can be left from any depth of calls. Where a
block of a tower calls `meet`, the tower waits until the others have come as far; then all are given a reply and go on.
There is one thread and no state outside of a run: nothing is kept on modules, a tower used alone is as ever.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import torch._dynamo.decorators
from torch import nn


try:
    import greenlet
except ImportError as error:
    raise ImportError(
        "peft_read needs the package `greenlet` to run towers in lockstep: pip install greenlet"
    ) from error


T = TypeVar("T")
# For functions in which towers take turns, not for the towers that they call, whose blocks may be compiled. What
# `torch.compiler.disable(recursive=False)` does, without a wrapper that costs more than the function.
_outside_of_graphs = torch._dynamo.decorators.skip


class LockstepError(RuntimeError):
    """Towers can't be run in lockstep the way in which they were asked to."""


@_outside_of_graphs
def run_in_lockstep(
    towers: Mapping[str, Callable[[], T]], exchange: Callable[[int, dict[str, Any]], Mapping[str, Any]]
) -> dict[str, T]:
    """Run towers together, each until it ends; whenever all that still run wait in `meet`, serve the lowest level.

    Each tower has its own gradient and autocast modes and its own context variables, which it starts with as they are
    here. `exchange` is called in the caller's. If a tower or `exchange` raises, all other towers are unwound, and the
    error goes to the caller.

    Args:
        towers: by name, what runs a tower.
        exchange: called with a level and, by name, what the towers that wait there gave to `meet`; returns, by name,
            what `meet` returns to each of them.

    Returns:
        By name, in the order of `towers`, what each returned.

    Raises:
        LockstepError: if `exchange` leaves out a tower, or for the reasons for which `meet` raises it.
    """
    modes = _Modes.current()
    hooks = _saved_tensors_hooks()
    running = {name: _Tower(name, call, modes, hooks) for name, call in towers.items()}
    results: dict[str, T] = {}

    @_outside_of_graphs
    def advance(tower: _Tower, *reply: Any) -> None:
        result = tower.advance(modes, *reply)
        if tower.dead:
            results[tower.name] = result
            del running[tower.name]

    try:
        for tower in list(running.values()):
            advance(tower)
        while running:
            level = min(tower.level for tower in running.values())
            here = [tower for tower in running.values() if tower.level == level]
            replies = exchange(level, {tower.name: tower.take_payload() for tower in here})
            for tower in here:
                if tower.name not in replies:
                    raise LockstepError(f"The exchange at level {level} has no reply for the {tower.name} tower.")
                advance(tower, replies[tower.name])
    except BaseException as error:
        for tower in running.values():
            tower.abort(modes, error)
        raise
    finally:
        running.clear()
    return {name: results[name] for name in towers}


@_outside_of_graphs
def meet(level: int, payload: Any) -> Any:
    """Wait, inside of a tower's forward, until all other towers wait or have ended; called by the tower's blocks.

    Args:
        level: number of the meeting, higher than that of the tower's last one. A tower may leave out levels.
        payload: what the exchange is given of this tower.

    Returns:
        The exchange's reply to this tower; None if no tower runs here, because the model is used alone.

    Raises:
        LockstepError: if the block is recomputed in a backward pass, lies inside of a checkpointed part, is called in
            inference mode while the run isn't or the reverse, or comes to a level that is behind it.
    """
    tower = _current_tower()
    return None if tower is None else tower.meet(level, payload)


@_outside_of_graphs
def current_tower() -> str | None:
    """Name of the tower that runs here, None outside of a run; raises as `meet` does for recomputed blocks."""
    tower = _current_tower()
    return None if tower is None else tower.name


@_outside_of_graphs
def count_call(module: nn.Module) -> int:
    """Count a call of a module by the tower that runs here, for blocks that run several times in a forward (ALBERT).

    Returns:
        How often this has been called for this module before in this run; 0 outside of a run.
    """
    tower = _current_tower()
    if tower is None:
        return 0
    count = tower.calls.get(id(module), 0)
    tower.calls[id(module)] = count + 1
    return count


class _Modes(NamedTuple):
    """torch's modes that belong to the thread, and have to follow its towers."""

    grad: bool
    autocast_cache: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    @_outside_of_graphs
    def current(cls) -> _Modes:
        autocast = tuple(
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in _autocast_devices()
        )
        return cls(torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), autocast)

    @_outside_of_graphs
    def restore(self) -> None:
        if self == _Modes.current():
            return
        torch.set_grad_enabled(self.grad)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        for device, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


class _AbortedError(Exception):
    """Unwinds a waiting tower. Not a BaseException: forward hooks that clean up don't see those."""


class _Tower(greenlet.greenlet):
    """The coroutine of one tower."""

    @_outside_of_graphs
    def __init__(self, name: str, call: Callable[[], Any], modes: _Modes, hooks: Any) -> None:
        super().__init__(call)  # its parent, to which it switches when it ends, is the greenlet that makes it
        self.gr_context = contextvars.copy_context()
        self.name = name
        self.level = -1
        self.calls: dict[int, int] = {}
        self._modes = modes
        self._inference = torch.is_inference_mode_enabled()
        self._hooks = hooks
        self._payload: Any = None
        self._aborted = False

    @_outside_of_graphs
    def advance(self, outside: _Modes, *reply: Any) -> Any:
        """Run the tower until it meets or ends."""
        self._modes.restore()
        try:
            return self.switch(*reply)
        except BaseException as error:
            error.add_note(f"(raised in the {self.name} tower, which ran in lockstep)")
            raise
        finally:
            self._modes = _Modes.current()
            outside.restore()

    @_outside_of_graphs
    def abort(self, outside: _Modes, cause: BaseException) -> None:
        """Unwind the tower if it waits."""
        if not self:  # never started, or ended
            return
        self._aborted = True
        self._modes.restore()
        try:
            self.throw(_AbortedError())
        except _AbortedError:
            pass
        except BaseException as error:
            cause.add_note(f"(the {self.name} tower, when it was stopped for this, raised {error!r})")
        finally:
            outside.restore()

    @_outside_of_graphs
    def take_payload(self) -> Any:
        payload, self._payload = self._payload, None
        return payload

    @_outside_of_graphs
    def meet(self, level: int, payload: Any) -> Any:
        """The tower's side of a meeting."""
        if self._aborted:
            raise _AbortedError
        if level <= self.level:
            raise LockstepError(
                f"The {self.name} tower comes to level {level} after level {self.level}. Levels have to rise in the "
                "order in which a tower's blocks run, and a tower has to run once in a forward."
            )
        if torch.is_inference_mode_enabled() != self._inference:
            raise LockstepError(
                f"The {self.name} tower holds torch.inference_mode open across its blocks, which can't be kept from "
                "the other towers. Use torch.no_grad there, or put inference_mode around the whole model."
            )
        if _saved_tensors_hooks() != self._hooks:
            raise LockstepError(
                f"A block of the {self.name} tower that meets other towers lies inside of a part that is checkpointed "
                "as a whole, or that holds torch.autograd.graph.saved_tensors_hooks open. Checkpoint its blocks one "
                "by one: set `gradient_checkpointing = False` on the module around them."
            )
        self.level, self._payload = level, payload
        return self.parent.switch()


@_outside_of_graphs
def _current_tower() -> _Tower | None:
    current = around = greenlet.getcurrent()
    while around is not None and not isinstance(around, _Tower):
        around = around.parent
    if around is not current and around is not None:
        raise LockstepError(f"A block of the {around.name} tower runs in a greenlet inside of the tower's own.")
    if around is None and torch._C._current_graph_task_id() != -1:
        raise LockstepError(
            "A block that meets other towers was called in the backward pass: a checkpoint around it, or around "
            "several blocks, recomputes it when the other towers aren't there. Checkpoint what is inside of the block."
        )
    return around


@_outside_of_graphs
def _saved_tensors_hooks() -> Any:
    """What a checkpoint that isn't reentrant leaves on a stack of the thread as long as its function runs."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


@cache
@_outside_of_graphs
def _autocast_devices() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)
