"""READ and LSTTA for Hugging Face PEFT: adapters for video, audio and language models.

Importing the package makes `READ` and `LSTTA` methods of PEFT like any built-in ones.
"""

from .tuners.registration import add_peft_type, register


add_peft_type("READ")
add_peft_type("LSTTA")

from .architectures.targets import find_feed_forward_outputs  # noqa: E402
from .cards.overrides import install as install_cards  # noqa: E402
from .cards.writing import describe_adapter  # noqa: E402
from .forward.description import describe_tokens  # noqa: E402
from .lstta.config import LsttaConfig  # noqa: E402  (a config is a dataclass of the type that was just added)
from .lstta.model import LsttaModel  # noqa: E402
from .pvla.arguments import PvlaArguments, PvlaSeq2SeqTrainingArguments, PvlaTrainingArguments  # noqa: E402
from .pvla.loss import PvlaLoss  # noqa: E402
from .pvla.picture import plot_plan  # noqa: E402
from .pvla.states import VideoTextStates  # noqa: E402
from .pvla.trainer import PvlaMixin, PvlaSeq2SeqTrainer, PvlaTrainer  # noqa: E402
from .pvla.transport import partial_transport  # noqa: E402
from .read.config import ReadConfig  # noqa: E402
from .read.model import ReadModel  # noqa: E402
from .recurrence.onnx import onnx_translations  # noqa: E402
from .recurrence.scan import recurrent_scan  # noqa: E402
from .trimodal.configuration import TrimodalConfig  # noqa: E402
from .trimodal.heads import TrimodalForFrameClassification, TrimodalForSequenceClassification  # noqa: E402
from .trimodal.modeling import TrimodalModel  # noqa: E402
from .trimodal.processing import TrimodalProcessor  # noqa: E402
from .tuners.loading import install as install_loading  # noqa: E402


register(ReadConfig, ReadModel)
register(LsttaConfig, LsttaModel)
install_loading()
install_cards()

__version__ = "0.1.0"
__all__ = [
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
    "TrimodalForFrameClassification",
    "TrimodalForSequenceClassification",
    "TrimodalModel",
    "TrimodalProcessor",
    "VideoTextStates",
    "describe_adapter",
    "describe_tokens",
    "find_feed_forward_outputs",
    "onnx_translations",
    "partial_transport",
    "plot_plan",
    "recurrent_scan",
]
