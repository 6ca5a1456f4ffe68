"""The places where PEFT and transformers write a card, which for READ's and LSTTA's adapters write ours.

PEFT has one hook, `create_or_update_model_card`. It isn't enough: it runs before there are files, transformers'
`push_to_hub` writes another card over it, from the Hub or from a general template, and so does its Trainer. All other
models, LoRA's among them, take the way that they always took.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..tuners.config import AdapterConfig
from ..tuners.inner import active_inner_adapters, inner_adapters, save_inner_adapters
from .page import Page, UnreadableCardError
from .training import facts_of_trainer
from .writing import (
    CARD,
    is_ours,
    keep_facts,
    remote_card,
    write_card,
    write_card_if_readable,
    write_card_to_push,
)


Call = Callable[..., Any]
OURS = "_peft_read_original"  # where a method keeps the one that it overrides
GIVEN = "_peft_read_given"  # where a Trainer keeps what its pushes were told for the card
# The model that is being saved, and will write its card thereafter; other threads may save it as well.
_saving: ContextVar[PeftModel | None] = ContextVar("saving", default=None)
PUSH = "_peft_read_push"  # where a Trainer keeps the arguments of its push while it lasts


def install() -> None:
    """Let READ's and LSTTA's models write their card; harmless when called again.

    Raises:
        ImportError: if PEFT or transformers no longer has one of the places.
    """
    for owner, name, ours in (
        (PeftModel, "save_pretrained", _save_pretrained),
        (PeftModel, "create_or_update_model_card", _create_or_update_model_card),
        (PeftModel, "_upload_modified_files", _upload_modified_files),
        (Trainer, "push_to_hub", _push_to_hub),
        (Trainer, "create_model_card", _create_model_card),
        (Trainer, "_push_from_checkpoint", _push_from_checkpoint),
    ):
        _override(owner, name, ours)


def _override(owner: type, name: str, ours: Call) -> None:
    """Put `ours(original, self, arguments)` before a method, for our models alone."""
    found = getattr(owner, name, None)
    if found is None:
        raise ImportError(
            f"peft_read writes model cards through {owner.__name__}.{name}, which this version of PEFT or "
            "transformers doesn't have. Upgrade peft_read, or install the versions that it was released for."
        )
    original = getattr(found, OURS, found)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_ours(self.accelerator.unwrap_model(self.model) if isinstance(self, Trainer) else self):
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        call = functools.partial(original, self, *args, **kwargs)
        given.apply_defaults()
        return ours(call, self, given.arguments)

    setattr(method, OURS, original)
    setattr(owner, name, method)


def _save_pretrained(save: Call, model: PeftModel, given: dict[str, Any]) -> None:
    """Save, and then write the card: there are files to tell of, and no fault in it keeps them from being saved."""
    inner, active = inner_adapters(model), active_inner_adapters(model)
    for config in cast(dict[str, AdapterConfig], model.peft_config).values():
        config.inner_adapters, config.active_inner_adapters = inner, active
    token = _saving.set(model)
    try:
        save()
    finally:
        _saving.reset(token)
    if given["is_main_process"]:
        folder, state_dict = Path(given["save_directory"]), given["kwargs"].get("state_dict")
        for name in given["selected_adapters"] or model.peft_config:
            save_inner_adapters(model, folder if name == "default" else folder / name, state_dict)
        write_card_if_readable(model, Path(given["save_directory"]))


def _create_or_update_model_card(_: Call, model: PeftModel, given: dict[str, Any]) -> None:
    if _saving.get() is not model:
        write_card(model, Path(given["output_dir"]))


def _upload_modified_files(upload: Call, model: PeftModel, given: dict[str, Any]) -> Any:
    """Upload a saved model, with our card in place of the one that transformers has just written over it."""
    folder, repo_id = Path(given["working_dir"]), given["repo_id"]
    try:
        theirs = Page.read(folder / CARD, f"{CARD} of {repo_id} on the Hub")
        remote = remote_card(repo_id, given["revision"], given["token"])
    except UnreadableCardError as error:
        (folder / CARD).unlink(missing_ok=True)  # so that the one on the Hub stays
        warnings.warn(f"The adapter is pushed, its card isn't. {error}", stacklevel=2)
        return upload()
    tags = theirs.parts.get("tags", []) if theirs else []  # those asked for with this push stand only there
    write_card_to_push(model, folder, repo_id, remote=remote, tags=tags)
    return upload()


def _push_to_hub(push: Call, trainer: Trainer, given: dict[str, Any]) -> Any:
    """Push, and let the card know where to: the Trainer doesn't tell `create_model_card`."""
    setattr(trainer, PUSH, given)
    try:
        return push()
    finally:
        delattr(trainer, PUSH)


def _create_model_card(_: Call, trainer: Trainer, given: dict[str, Any]) -> None:
    """The card with what the Trainer knows, before the Trainer uploads its folder."""
    if not trainer.is_world_process_zero():
        return
    model, folder = trainer.accelerator.unwrap_model(trainer.model), Path(str(trainer.args.output_dir))
    # What one push was told holds for the next ones, and for those between.
    told = {name: value for name, value in given.items() if name != "self"}
    told = {name: getattr(trainer, GIVEN, {}).get(name) if value is None else value for name, value in told.items()}
    setattr(trainer, GIVEN, told)
    keep_facts(model, facts_of_trainer(trainer, model, told))
    if trainer.hub_model_id is None:
        write_card(model, folder)
        return
    args, push = trainer.args, getattr(trainer, PUSH, {})
    revision, token = push.get("revision") or args.hub_revision, push.get("token") or args.hub_token
    remote = remote_card(trainer.hub_model_id, revision, token)
    write_card_to_push(model, folder, trainer.hub_model_id, remote=remote, local=Page.read(folder / CARD))


def _push_from_checkpoint(push: Call, trainer: Trainer, given: dict[str, Any]) -> None:
    """Push while training goes on, with a card that doesn't write over what was changed on the Hub."""
    if trainer.args.hub_strategy != HubStrategy.END:
        try:
            Trainer.create_model_card(trainer)
        except Exception as error:  # whatever it is, and the Hub has many, it must not end a training
            warnings.warn(
                f"Step {trainer.state.global_step} isn't pushed, as its card can't be: {error}", stacklevel=2
            )
            return
    push()
