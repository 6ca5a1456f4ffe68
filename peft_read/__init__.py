"""READ for Hugging Face PEFT: recurrent adapters for video, audio and language models.

Importing the package makes `READ` a method of PEFT like any built-in one.
"""

from .registration import add_peft_type, register


add_peft_type("READ")

from .read.config import ReadConfig  # noqa: E402  (a config is a dataclass of the type that was just added)
from .read.model import ReadModel  # noqa: E402
from .read.recurrence import recurrent_scan  # noqa: E402
from .read.targets import find_feed_forward_outputs  # noqa: E402
from .trimodal.configuration import TrimodalConfig  # noqa: E402
from .trimodal.heads import TrimodalForFrameClassification, TrimodalForSequenceClassification  # noqa: E402
from .trimodal.modeling import TrimodalModel  # noqa: E402
from .trimodal.processing import TrimodalProcessor  # noqa: E402


register(ReadConfig, ReadModel)

__version__ = "0.1.0"
__all__ = [
    "ReadConfig",
    "ReadModel",
    "TrimodalConfig",
    "TrimodalForFrameClassification",
    "TrimodalForSequenceClassification",
    "TrimodalModel",
    "TrimodalProcessor",
    "find_feed_forward_outputs",
    "recurrent_scan",
]
