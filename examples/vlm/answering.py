"""A Trainer that judges a model by what it says, and answers of a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from peft_read import PvlaSeq2SeqTrainer

from .data import Sample
from .metrics import Parse, score


class AnswerTrainer(PvlaSeq2SeqTrainer):
    """Evaluates by generation: what the model says to the samples of the evaluation set, scored by `metric`.

    Attributes:
        metric: as in `vlm.metrics.score`, and `parse`.
        max_new_tokens: of an answer, at most.
    """

    metric: str
    parse: Parse
    max_new_tokens: int

    def answers(self, samples: Sequence[Sample]) -> list[str]:
        """What the model says to each sample, greedily; by all processes together."""
        asked = [sample.without_answer() for sample in samples]
        generated = self.predict(asked, max_new_tokens=self.max_new_tokens, do_sample=False).predictions  # type: ignore[arg-type]
        tokenizer = self.data_collator.processor.tokenizer  # type: ignore[union-attr]
        ids = np.where(generated < 0, tokenizer.pad_token_id, generated)  # padding between batches
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **options: Any
    ) -> dict[str, float]:
        """The scores of what the model says, logged; the Trainer saves and stops by them if it's told to."""
        samples = self.eval_dataset if eval_dataset is None else eval_dataset
        start = time.time()
        found = score(self.answers(samples), samples, self.metric, self.parse)  # type: ignore[arg-type]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.time() - start, 2)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """What was generated, without the prompt before it."""
        loss, generated, labels = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        if isinstance(generated, Tensor):
            generated = generated[:, inputs["input_ids"].shape[1] :]
            # As long as each other, so that batches and processes can be put together.
            missing = self.max_new_tokens - generated.shape[1]
            generated = nn.functional.pad(generated, (0, missing), value=-100)
        return loss, generated, labels
