"""READ and LSTTA for Hugging Face PEFT: adapters for video, audio and language models.

Importing the package makes `READ` and `LSTTA` methods of PEFT like any built-in ones. The rooms, from the bottom up;
each one's docstring says what its files are:

- `recurrence`: the masked scan of a recurrent cell, which `recurrence/naive.py` defines.
- `architectures`: where blocks and feed-forward parts are in a model; exceptions of model types in `exceptions.py`.
- `lockstep`: several towers' forwards, block by block, for composite models.
- `forward`: what a layer must know of the running forward: padding, packing, caches.
- `tuners`: what both methods share as methods of PEFT.
- `read`, `lstta`: the two methods. `pvla`: the alignment of video and words, and Trainers. `trimodal`: the model of
  three towers. `cards`: model cards.
"""

from .architectures.targets import find_feed_forward_outputs
from .cards.overrides import install as install_cards
from .cards.writing import describe_adapter
from .forward.description import describe_tokens
from .lstta.config import LsttaConfig
from .lstta.model import LsttaModel
from .pvla.arguments import PvlaArguments, PvlaSeq2SeqTrainingArguments, PvlaTrainingArguments
from .pvla.loss import PvlaLoss
from .pvla.picture import plot_plan
from .pvla.states import VideoTextStates
from .pvla.trainer import PvlaMixin, PvlaSeq2SeqTrainer, PvlaTrainer
from .pvla.transport import partial_transport
from .read.config import ReadConfig
from .read.model import ReadModel
from .recurrence.onnx import onnx_translations
from .recurrence.scan import recurrent_scan
from .trimodal.configuration import TrimodalConfig
from .trimodal.features import FeatureTower, FeatureTowerConfig
from .trimodal.generation import TrimodalForConditionalGeneration
from .trimodal.heads import (
    TrimodalForFrameClassification,
    TrimodalForMultipleChoice,
    TrimodalForSequenceClassification,
)
from .trimodal.modeling import TrimodalModel
from .trimodal.picture import plot_importance
from .trimodal.processing import TrimodalProcessor
from .trimodal.retrieval import TrimodalForRetrieval
from .tuners.loading import install as install_loading
from .tuners.registration import register


__version__ = "0.1.0"  # the one place: packaging reads it here

register(ReadConfig, ReadModel)
register(LsttaConfig, LsttaModel)
install_loading()
install_cards()

__all__ = [
    "FeatureTower",
    "FeatureTowerConfig",
    "LsttaConfig",
    "LsttaModel",
    "PvlaArguments",
    "PvlaLoss",
    "PvlaMixin",
    "PvlaSeq2SeqTrainer",
    "PvlaSeq2SeqTrainingArguments",
    "PvlaTrainer",
    "PvlaTrainingArguments",
    "ReadConfig",
    "ReadModel",
    "TrimodalConfig",
    "TrimodalForConditionalGeneration",
    "TrimodalForFrameClassification",
    "TrimodalForMultipleChoice",
    "TrimodalForRetrieval",
    "TrimodalForSequenceClassification",
    "TrimodalModel",
    "TrimodalProcessor",
    "VideoTextStates",
    "describe_adapter",
    "describe_tokens",
    "find_feed_forward_outputs",
    "onnx_translations",
    "partial_transport",
    "plot_importance",
    "plot_plan",
    "recurrent_scan",
]
