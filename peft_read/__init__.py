"""READ and LSTTA for Hugging Face PEFT: adapters for video, audio and language models.

Importing the package makes `READ` and `LSTTA` methods of PEFT like any built-in ones.
"""

from .registration import add_peft_type, register


add_peft_type("READ")
add_peft_type("LSTTA")

from .lstta.config import LsttaConfig  # noqa: E402  (a config is a dataclass of the type that was just added)
from .lstta.model import LsttaModel  # noqa: E402
from .read.config import ReadConfig  # noqa: E402
from .read.model import ReadModel  # noqa: E402
from .read.recurrence import recurrent_scan  # noqa: E402
from .read.targets import find_feed_forward_outputs  # noqa: E402
from .trimodal.configuration import TrimodalConfig  # noqa: E402
from .trimodal.heads import TrimodalForFrameClassification, TrimodalForSequenceClassification  # noqa: E402
from .trimodal.modeling import TrimodalModel  # noqa: E402
from .trimodal.processing import TrimodalProcessor  # noqa: E402


register(ReadConfig, ReadModel)
register(LsttaConfig, LsttaModel)

__version__ = "0.1.0"
__all__ = [
    "LsttaConfig",
    "LsttaModel",
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
