"""Writing the card into the folder of an adapter, so that what a person changed in it stays."""

from __future__ import annotations

import dataclasses
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError
from peft import PeftModel, PeftType

from .content import Facts, generate
from .page import Page, UnreadableCardError, union
from .telling import check_told


CARD = "README.md"
# Where a model keeps what its card should say: what somebody told, and what a Trainer knew.
TOLD, KNOWN = "_peft_read_told", "_peft_read_known"


def is_ours(model: object) -> bool:
    """Whether this is a PEFT model whose adapters are READ's or LSTTA's; PEFT lets no other stand beside them."""
    ours = (PeftType["READ"], PeftType["LSTTA"])
    configs = model.peft_config.values() if isinstance(model, PeftModel) else ()
    return bool(configs) and all(config.peft_type in ours for config in configs)


def describe_adapter(
    model: PeftModel,
    *,
    data: str | None = None,
    results: Sequence[EvalResult] | None = None,
    training: Mapping[str, Any] | None = None,
    **metadata: Any,
) -> None:
    """Tell what a card should say beyond what the model tells; each save and push of the model says it from now on.

    A Trainer that makes the card tells its hyperparameters and metrics by itself.

    Args:
        model: an adapted model.
        data: sentences on what it was trained and evaluated on, in Markdown.
        results: evaluations, as huggingface_hub's `EvalResult`s; the Hub shows them beside the page.
        training: hyperparameters by name.
        metadata: fields of the card's metadata, such as `license`, `language`, `datasets` (ids on the Hub),
            `base_model`, `pipeline_tag`, or `model_name`, the title; by default the repository's or the folder's name.

    Raises:
        TypeError: if the model's adapters aren't READ's or LSTTA's, a result is no `EvalResult`, or something else is
            of a type that a card can't hold.
        ValueError: if a text can't stand on a card: it isn't Unicode, leaves a code block open, or is the card's own.

    Example:
        >>> import peft_read, peft, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = peft.get_peft_model(model, peft_read.ReadConfig(r=2, target_modules=["0"]))
        >>> describe_adapter(model, data="Words about rain.", license="mit")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     "Words about rain." in Path(folder, "README.md").read_text(encoding="utf-8")
        True
    """
    if not is_ours(model):
        raise TypeError(
            f"describe_adapter is for a PeftModel with adapters of READ or LSTTA, got {type(model).__name__}. Give it "
            "what get_peft_model or PeftModel.from_pretrained returned."
        )
    check_told(data, results, training, metadata)
    told = {"data": data, "results": results and list(results), "training": training and dict(training)}
    changes: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
    before = getattr(model, TOLD, Facts())
    setattr(model, TOLD, dataclasses.replace(before, **changes, metadata=before.metadata | metadata))


def keep_facts(model: PeftModel, facts: Facts) -> None:
    """Keep what a Trainer knows, for the pushes after its own."""
    setattr(model, KNOWN, facts)


def write_card_if_readable(model: PeftModel, folder: Path) -> None:
    """Write the card of an adapter that was just saved; if the one there can't be read, it stays, with a warning."""
    try:
        write_card(model, folder)
    except UnreadableCardError as error:
        warnings.warn(f"The adapter is saved, its card isn't. {error}", stacklevel=2)


def write_card(model: PeftModel, folder: Path) -> None:
    """Write the card of a saved adapter, or renew the one that is there.

    Raises:
        UnreadableCardError: if there is one that can't be read.
    """
    path = folder / CARD
    old = Page.read(path)
    page = (old or Page()).renewed(*generate(model, folder, None, _facts_of(model)))
    if old is None or not old.changed:
        page = page.synced()
    _write(page, path)


def write_card_to_push(
    model: PeftModel,
    folder: Path,
    repo_id: str,
    *,
    remote: Page | None,
    local: Page | None = None,
    tags: Sequence[str] = (),
) -> None:
    """Write the card that goes to the Hub, or renew the one that is there.

    Args:
        model: the model with its adapters.
        folder: where they are saved.
        repo_id: the repository to which the folder will be pushed.
        remote: the card there.
        local: the card in the folder, if a person may have changed it.
        tags: tags that the card gets in any case.

    Raises:
        ValueError: if persons changed both cards, each in another way.
    """
    conflicts = remote.conflicts(local) if remote and local and remote.changed and local.changed else []
    if conflicts:
        raise ValueError(
            f"The card was changed both in {folder / CARD} and on the Hub in {repo_id}, so neither is written over. "
            f"They differ in {', '.join(conflicts)}: make one of them as the other is, and push again."
        )
    old = local if local and (local.changed or not remote) else remote
    page = (old or Page()).renewed(*generate(model, folder, repo_id, _facts_of(model, tags)))
    if tags:
        page.parts["tags"] = union(page.parts.get("tags"), tags)
    _write(page.synced(), folder / CARD)


def _write(page: Page, path: Path) -> None:
    """Write a card whole or not at all: a Trainer may be uploading the folder."""
    draft = path.with_name(f"_{CARD}.{uuid.uuid4().hex}")  # nobody else's, and a Trainer uploads no name with `_`
    try:
        with draft.open("x", encoding="utf-8") as file:
            file.write(str(page))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _facts_of(model: PeftModel, tags: Sequence[str] = ()) -> Facts:
    """What was told about a model, and what its Trainer knew."""
    told, known = getattr(model, TOLD, Facts()), getattr(model, KNOWN, Facts())
    given = union(told.metadata.get("tags"), known.metadata.get("tags"))
    return Facts(
        data=told.data or known.data,
        unnamed_data=known.unnamed_data,
        results=[*told.results, *known.results],
        metrics=known.metrics,
        training=known.training | told.training,
        metadata=known.metadata | told.metadata | {"tags": union(given, tags)},
    )


def remote_card(repo_id: str, revision: str | None, token: bool | str | None) -> Page | None:
    """The card of a repository on the Hub, None if it has none."""
    for wanted in dict.fromkeys((revision, None)):  # a branch that isn't there yet starts as the main one
        try:
            # Forced: else an old copy in the cache takes the place of a card that can't be reached just now.
            path = hf_hub_download(repo_id, CARD, revision=wanted, token=token, force_download=True)
            return Page.read(Path(path), f"{CARD} of {repo_id} on the Hub")
        except RevisionNotFoundError:
            continue
        except RemoteEntryNotFoundError:
            return None
    return None
