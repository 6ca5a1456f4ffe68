"""The configuration of LSTTA: every field that a user sets, validated when it is set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftType

from ..lockstep.composite import MODALITIES
from ..tuners.checks import MOST_NAMES, check_bool, check_positive_int, shown
from ..tuners.config import AdapterConfig


@dataclass
class LsttaConfig(AdapterConfig):
    """Configuration of LSTTA, the long- and short-term trimodal adapter (Liu et al., ACM MM 2023, arXiv 2308.14274).

    Between the blocks of frozen towers for pictures, sound and text, which run in lockstep, sits at each level one
    adapter per tower. It brings the tower's tokens down to `r` dimensions, where they attend to those of the other
    towers in short windows of time (short-term semantic interaction); frames that don't matter in view of the whole
    clip are suppressed (long-term semantic filtering). What comes back is projected up and added. The up-projection
    starts at zero, so that the adapted model starts as the base model. The two modules are the paper's; its equations
    weren't at hand, so their form is ours.

    Args:
        r: width of the bottleneck; a multiple of `2 * num_heads`.
        num_heads: attention heads in it; half of them look by time, at what is simultaneous.
        window: time steps of the vision tower in a window.
        num_audio_windows: equal windows of the valid sound, for clips without pictures.
        num_levels: how often the towers meet, evenly over their depths; by default the depth of the shallowest tower.
        layers: names of a tower's blocks, in the order in which they run, relative to the tower, by `"vision"`,
            `"audio"` and `"text"`: for towers whose blocks aren't found. A block that runs several times is named as
            often. Saved with the names found.
        frame_filter: whether there is long-term semantic filtering.
        filter_form: `"gate"`: each frame is let through more or less by itself; `"choice"`: frames are measured by the
            most important one of their clip, which always counts fully.
        act_fn: activation after the down-projection, a key of transformers' `ACT2FN` without weights of its own.
        dropout: probability with which entries of an adapter's output are dropped in training.
        scaling: factor of an adapter's output.
        modules_to_save: modules that are trained and saved beside the adapters, such as a task head, and the `fusion`
            of a `TrimodalModel`, which starts at random.
        trainable_token_indices: tokens whose embeddings are trained and saved beside the adapter: indices into the
            input embeddings, or lists of indices by names of embeddings.
        ensure_weight_tying: keep tied what is tied to the input embeddings, where `modules_to_save` or
            `trainable_token_indices` train those.
        init_weights: start as the base model (default); False starts the up-projections at random too, which only
            tests need.

    Raises:
        ValueError: if a field has a value that it can't have, or two fields contradict each other.
    """

    r: int = field(default=64, metadata={"help": "Width of the bottleneck, a multiple of 2 * num_heads."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads in the bottleneck."})
    window: int = field(default=4, metadata={"help": "Time steps of the vision tower in a window."})
    num_audio_windows: int = field(default=8, metadata={"help": "Windows of the sound of clips without pictures."})
    num_levels: int | None = field(
        default=None, metadata={"help": "How often the towers meet; by default the depth of the shallowest one."}
    )
    layers: dict[str, list[str]] | None = field(
        default=None, metadata={"help": "Names of the blocks of each tower, by 'vision', 'audio' and 'text'."}
    )
    frame_filter: bool = field(default=True, metadata={"help": "Whether there is long-term semantic filtering."})
    filter_form: str = field(
        default="gate", metadata={"help": "'gate': frames pass by themselves; 'choice': measured by each other."}
    )

    # PEFT asks every configuration; which modules are adapted follows from `layers` and `num_levels`.
    target_modules: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["LSTTA"]
        for name in ("r", "num_heads", "window", "num_audio_windows"):
            check_positive_int(name, getattr(self, name))
        if self.num_levels is not None:
            check_positive_int("num_levels", self.num_levels)
        check_bool("frame_filter", self.frame_filter)
        if self.filter_form not in ("gate", "choice"):
            raise ValueError(f"`filter_form` must be 'gate' or 'choice', got {self.filter_form!r}.")
        if self.r % (2 * self.num_heads):
            raise ValueError(
                f"`r` must be a multiple of 2 * num_heads = {2 * self.num_heads}, since every head has a sine and a "
                f"cosine for each of its time scales; got r={self.r}."
            )
        self._check_layers()

    def _check_layers(self) -> None:
        if not isinstance(self.layers or {}, dict):
            raise ValueError(f"`layers` must be a dict of lists of blocks by tower, got {shown(self.layers)}.")
        for modality, names in (self.layers or {}).items():
            if modality not in MODALITIES:
                raise ValueError(f"`layers` goes by {', '.join(map(repr, MODALITIES))}, got {shown(modality)}.")
            if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) for n in names):
                raise ValueError(
                    f"`layers[{modality!r}]` must be a list of names of blocks, in the order in which they run, such "
                    f"as ['encoder.layers.0', 'encoder.layers.1'], got {shown(names)}."
                )
            if len(names) > MOST_NAMES:
                raise ValueError(f"`layers[{modality!r}]` must have at most {MOST_NAMES:,} names, got {len(names):,}.")
            if self.num_levels is not None and len(names) < self.num_levels:
                raise ValueError(
                    f"`num_levels={self.num_levels}` is more than the {len(names)} blocks in `layers[{modality!r}]`."
                )
