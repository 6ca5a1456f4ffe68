"""Which text tokens are words: not those that a chat template or a tokenizer puts around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .source import Batch


IGNORED = -100
WORDS = ("all", "answer", "prompt")
# A conversation whose texts are found again in what the template makes of it.
_TEXTS = ("question", "answer")


class TemplateTokens(NamedTuple):
    """Tokens that are never words.

    Attributes:
        special: ids of special tokens, sorted.
        runs: ids that a chat template puts around what is said, such as a role's name, two at least: with the special
            token that they follow, if they follow one.
    """

    special: tuple[int, ...] = ()
    runs: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, processing: Any) -> TemplateTokens:
        """Those of a tokenizer, or of a processor that has one; none of anything else."""
        tokenizer = getattr(processing, "tokenizer", processing)
        if not hasattr(tokenizer, "all_special_ids"):
            return cls()
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        return cls(tuple(sorted(special)), _runs(processing, tokenizer, special))

    def among(self, ids: Tensor) -> Tensor:
        """Which tokens are of these, `(batch, time)` bool."""
        found = torch.isin(ids, ids.new_tensor(self.special))
        for run in self.runs:
            time = ids.shape[1] - len(run) + 1
            if time < 1:
                continue
            begins = torch.stack([ids[:, i : i + time] == token for i, token in enumerate(run)]).all(0)
            for i in range(len(run)):
                found[:, i : i + time] |= begins
        return found


def choose_words(text: Tensor, batch: Batch, words: str) -> Tensor:
    """Of text tokens those that are learnt, or those before them.

    Args:
        text: `(batch, time)`, bool or weights.
        batch: with `labels` over the same positions, unless all words are wanted.
        words: one of `WORDS`.

    Raises:
        ValueError: if there are no such labels.
    """
    if words == "all":
        return text
    labels = batch.get("labels")
    if labels is None or labels.shape != text.shape:
        form = "none" if labels is None else f"labels of shape {tuple(labels.shape)}"
        raise ValueError(
            f"pvla_words={words!r} tells words by `labels` over the tokens that the model reads, of shape "
            f"{tuple(text.shape)}, and the batch has {form}. Set pvla_words='all', and let the collator give "
            "'text_token_mask' where not all text is meant."
        )
    learnt = labels != IGNORED
    return text * (learnt if words == "answer" else ~learnt)


def _runs(processing: Any, tokenizer: Any, special: set[int]) -> tuple[tuple[int, ...], ...]:
    """What the chat template puts around a question and an answer, the longest first."""
    if not getattr(tokenizer, "is_fast", False):
        return ()
    found: set[tuple[int, ...]] = set()
    for rendered in _rendered(processing):
        encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        spans = [(start, start + len(text)) for text in _TEXTS if (start := rendered.rfind(text)) >= 0]
        run: list[int] = []
        for token, (low, high) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if any(low < end and high > start for start, end in spans):
                found.add(tuple(run))
                run = []
            elif token in special:
                found.add(tuple(run))
                run = [token]
            else:
                run.append(token)
        found.add(tuple(run))
    return tuple(sorted((one for one in found if len(one) > 1), key=lambda one: (-len(one), one)))


def _rendered(processing: Any) -> Iterator[str]:
    """A question and an answer in a chat template's words, with a video and without; nothing without a template."""
    contents: tuple[Callable[[str], Any], ...] = (
        lambda text: [{"type": "video"}, {"type": "text", "text": text}],  # some families have a template for videos
        lambda text: [{"type": "text", "text": text}],
        lambda text: text,
    )
    question, answer = _TEXTS
    for asked, said in zip(contents, (contents[1], contents[1], contents[2]), strict=True):
        messages = [{"role": "user", "content": asked(question)}, {"role": "assistant", "content": said(answer)}]
        with suppress(Exception):  # no template, or one that takes other contents
            yield processing.apply_chat_template(messages, tokenize=False)
