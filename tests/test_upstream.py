"""Names of other packages that aren't promised to stay: each with what stands on it, so that a release that moves one
is told by its name.
"""

import ast
import importlib
import inspect
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from models import base_model
from packaging.requirements import Requirement
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import peft_read


PACKAGE = Path(peft_read.__file__).parent
INJECTION = "putting READ's and LSTTA's layers into a model"
STATES = "READ's states beside a KV cache"
CARDS = "model cards that are written when an adapter is saved or pushed"
PVLA = "PVLA's Trainer"
LOADING = "strict loading of adapters"
REGISTRY = "READ and LSTTA as methods of PEFT"
LOCKSTEP = "towers that run in lockstep"


@dataclass(frozen=True)
class Name:
    """One name that the package relies on.

    Attributes:
        path: module and attributes, as `module:attribute.attribute`.
        feature: what stands on it.
        parameters: names that its signature has to begin with; None if it isn't called or overridden.
    """

    path: str
    feature: str
    parameters: tuple[str, ...] | None = None

    def fault(self) -> str | None:
        """What is wrong with it in the packages that are installed, None if nothing is."""
        module, _, attributes = self.path.partition(":")
        versions = f"{module.partition('.')[0]} {importlib.import_module(module.partition('.')[0]).__version__}"
        try:
            found: Any = importlib.import_module(module)
            for attribute in attributes.split("."):
                found = getattr(found, attribute)
        except (ImportError, AttributeError):
            return f"{versions} has moved {self.path}, on which stands: {self.feature}."
        if self.parameters is None:
            return None
        given = tuple(inspect.signature(found).parameters)
        if given[: len(self.parameters)] != self.parameters:
            return f"{versions} calls {self.path} with {given}, not {self.parameters}. On it stands: {self.feature}."
        return None


def names(feature, module, attributes):
    return [Name(f"{module}:{name}", feature, parameters) for name, parameters in attributes.items()]


MODEL, ADAPTER = ("self", "peft_config"), ("model", "config", "adapter_name")
TABLE = [
    *names(
        REGISTRY,
        "peft.mapping",
        {"PEFT_TYPE_TO_CONFIG_MAPPING": None, "PEFT_TYPE_TO_TUNER_MAPPING": None, "PEFT_TYPE_TO_PREFIX_MAPPING": None},
    ),
    *names(REGISTRY, "peft.utils", {"register_peft_method": ("name", "config_cls", "model_cls", "prefix")}),
    *names(INJECTION, "peft.utils", {"AuxiliaryTrainingWrapper": None, "TaskType": None}),
    *names(INJECTION, "peft.utils.constants", {"SEQ_CLS_HEAD_NAMES": None}),
    *names(INJECTION, "peft.utils.other", {"get_pattern_key": ("pattern_keys", "key_to_match")}),
    *names(
        INJECTION,
        "peft.tuners.tuners_utils",
        {
            "BaseTuner": None,
            "BaseTunerLayer": None,
            "_get_in_out_features": ("module",),
            "_maybe_include_all_linear_layers": ("peft_config", "model"),
            "BaseTuner._prepare_adapter_config": (*MODEL, "model_config"),
            "BaseTuner._prepare_model": (*MODEL, "model"),
            "BaseTuner._create_and_replace": (
                *(*MODEL, "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name"),
            ),
            "BaseTuner._replace_module": ("self", "parent", "child_name", "new_module", "child"),
            "BaseTuner.inject_adapter": ("self", "model", "adapter_name"),
            "BaseTuner._check_target_module_exists": ("peft_config", "key"),
            "BaseTuner.unload": ("self",),
            "BaseTunerLayer._get_base_layer_device_and_dtype": ("self", "base_layer"),
            "BaseTunerLayer._move_adapter_to_device_of_base_layer": ("self", "adapter_name", "device"),
            "BaseTunerLayer._cast_input_dtype": ("self", "x", "dtype"),
            "BaseTunerLayer.set_adapter": ("self", "adapter_names", "inference_mode"),
            "BaseTunerLayer.active_adapters": None,
            "BaseTunerLayer.disable_adapters": None,
        },
    ),
    *names(
        "the refusal to merge what can't be merged",
        "peft.tuners.tuners_utils",
        {
            "BaseTuner._check_merge_allowed": ("self",),
            "BaseTuner.merge_adapter": ("self", "adapter_names", "safe_merge"),
        },
    ),
    *names(
        LOADING,
        "peft.tuners.tuners_utils",
        {
            "BaseTuner._get_adapter_state_dict": (*ADAPTER, "state_dict", "unwanted_adapter_names"),
            "BaseTuner._remap_adapter_state_dict_for_load": (*ADAPTER, "state_dict"),
            "BaseTuner._remove_adapter_name_from_key": ("key", "adapter_name"),
        },
    ),
    *names(
        LOADING,
        "peft",
        {
            "PeftModel.from_pretrained": ("model", "model_id", "adapter_name", "is_trainable", "config"),
            "PeftModel.load_adapter": ("self", "model_id", "adapter_name"),
            "PeftConfig._get_peft_type": ("model_id",),
        },
    ),
    *names(LOADING, "peft.utils", {"ModulesToSaveWrapper": None}),
    *names(LOADING, "peft.utils.save_and_load", {"load_peft_weights": ("model_id", "device")}),
    *names(
        "transformers' own load_adapter",
        "transformers.integrations.peft",
        {"PeftAdapterMixin.load_adapter": ("self", "peft_model_id", "adapter_name")},
    ),
    *names(
        "transformers' own load_adapter",
        "transformers.utils.loading_report",
        {
            "LoadStateDictInfo": (
                "missing_keys",
                "unexpected_keys",
                "mismatched_keys",
                "error_msgs",
                "conversion_errors",
            )
        },
    ),
    *names("adapters of sharded models", "torch.distributed.tensor", {"DTensor": None}),
    *names("adapters per row with modules of each", "torch.utils._pytree", {"tree_map": ("func", "tree")}),
    *names("offloaded bases", "accelerate.hooks", {"SequentialHook": None}),
    *names("offloaded bases", "peft.utils.other", {"TrainableTokensWrapper": None}),
    *names(
        CARDS,
        "peft",
        {
            "PeftModel.save_pretrained": ("self", "save_directory"),
            "PeftModel.create_or_update_model_card": ("self", "output_dir"),
            "PeftModel._upload_modified_files": ("self", "working_dir", "repo_id"),
        },
    ),
    *names(
        CARDS,
        "transformers",
        {
            "Trainer.push_to_hub": ("self", "commit_message", "blocking", "token", "revision"),
            "Trainer.create_model_card": (
                "self",
                "language",
                "license",
                "tags",
                "model_name",
                "finetuned_from",
                "tasks",
            ),
            "Trainer._push_from_checkpoint": ("self", "checkpoint_folder"),
        },
    ),
    *names(
        CARDS,
        "transformers.modelcard",
        {"TASK_MAPPING": None, "TrainingSummary.from_trainer": ("trainer", "language")},
    ),
    *names(CARDS, "transformers.models.auto.modeling_auto", {"MODEL_MAPPING_NAMES": None}),
    *names(CARDS, "transformers.trainer_utils", {"HubStrategy.END": None, "has_length": ("dataset",)}),
    *names(CARDS, "huggingface_hub.utils", {"validate_repo_id": ("repo_id",)}),
    *names(CARDS, "huggingface_hub.repocard", {"RepoCard": ("content", "ignore_metadata_errors")}),
    *names(CARDS, "huggingface_hub.dataclasses", {"strict": None}),
    *names(
        PVLA,
        "transformers",
        {
            "Trainer._inner_training_loop": ("self", "batch_size", "args"),
            "Trainer._set_signature_columns_if_needed": ("self",),
            "Trainer.get_batch_samples": ("self", "epoch_iterator", "num_batches", "device"),
            "Trainer.compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
            "Trainer._prepare_input": ("self", "data"),
            "Trainer.prediction_step": ("self", "model", "inputs", "prediction_loss_only", "ignore_keys"),
            "Trainer.evaluation_loop": ("self", "dataloader", "description", "prediction_loss_only", "ignore_keys"),
            "Trainer.log": ("self", "logs"),
        },
    ),
    *names(PVLA, "transformers.trainer_pt_utils", {"find_batch_size": ("tensors",)}),
    *names(
        PVLA,
        "accelerate.utils",
        {"extract_model_from_parallel": ("model", "keep_fp32_wrapper", "keep_torch_compile")},
    ),
    *names(
        PVLA, "transformers.trainer_utils", {"EvalLoopOutput": ("predictions", "label_ids", "metrics", "num_samples")}
    ),
    *names(
        "pictures of PVLA's plans in the logs",
        "transformers.integrations.integration_utils",
        {"TensorBoardCallback": ("tb_writer",), "WandbCallback": None},
    ),
    *names(
        STATES,
        "transformers.cache_utils",
        {
            "Cache.get_seq_length": ("self",),
            "Cache.update": ("self", "key_states", "value_states", "layer_idx"),
            "Cache.reorder_cache": ("self", "beam_idx"),
            "Cache.batch_repeat_interleave": ("self", "repeats"),
            "Cache.batch_select_indices": ("self", "indices"),
            "Cache.crop": ("self", "tokens_to_remove"),
            "Cache.reset": ("self",),
            "Cache.get_max_length": ("self",),
            "Cache.is_compileable": None,
            "EncoderDecoderCache.get_seq_length": ("self",),
        },
    ),
    *names(
        "where READ adapts a model by default",
        "transformers",
        {
            "PreTrainedModel.input_modalities": None,
            "PreTrainedModel.get_decoder": ("self",),
            "PreTrainedModel.get_encoder": ("self", "modality"),
        },
    ),
    *names("sharding by FSDP", "transformers", {"PreTrainedModel._no_split_modules": None}),
    *names("sharding by FSDP", "accelerate.utils", {"parse_flag_from_env": ("key", "default")}),
    *names("packed sequences, told by positions", "transformers", {"PreTrainedConfig._attn_implementation": None}),
    *names("gradient checkpointing", "transformers.modeling_layers", {"GradientCheckpointingLayer": None}),
    *names(
        "which models generate",
        "transformers.models.auto.modeling_auto",
        {"MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": None, "MODEL_FOR_MASKED_LM_MAPPING_NAMES": None},
    ),
    *names("linear layers of GPT-2", "transformers.pytorch_utils", {"Conv1D": ("nf", "nx")}),
    *names("activations by name", "transformers.activations", {"ACT2FN": None}),
    *names("hidden states of towers in lockstep", "transformers.utils.output_capturing", {"_active_collector": None}),
    *names("outputs of TrimodalModel", "transformers.modeling_outputs", {"BaseModelOutput": None}),
    *names("outputs of TrimodalModel", "transformers.utils.generic", {"ModelOutput": None, "can_return_tuple": None}),
    *names("TrimodalProcessor on the Hub", "transformers.utils.hub", {"PushToHubMixin": None}),
    *names("TrimodalProcessor on the Hub", "transformers.utils", {"PROCESSOR_NAME": None}),
    *names(
        "bases that Accelerate keeps elsewhere",
        "accelerate.hooks",
        {
            "AlignDevicesHook.pre_forward": ("self", "module"),
            "AlignDevicesHook.post_forward": ("self", "module", "output"),
        },
    ),
    *names("which forward a recomputed layer belongs to", "torch._C", {"_current_graph_task_id": None}),
    *names(
        "gradients of compiled recurrences",
        "torch._C",
        {
            "DispatchKey.AutogradFunctionality": None,
            "_dispatch_tls_is_dispatch_key_excluded": None,
            "_dispatch_tls_set_dispatch_key_excluded": None,
        },
    ),
    *names("masks of pairs in compiled models", "torch", {"_assert_async": None}),
    *names("what depends on values in traced models", "torch.jit", {"is_tracing": ()}),
    *names(LOCKSTEP, "torch._C._autograd", {"_top_saved_tensors_default_hooks": None}),
    *names(LOCKSTEP, "torch._dynamo.decorators", {"skip": None}),
]


@pytest.mark.parametrize("name", TABLE, ids=lambda name: name.path)
def test_is_where_it_was(name):
    """Else the message says what was moved, by which release, and what stands on it."""
    fault = name.fault()
    assert fault is None, fault


def test_a_moved_name_is_told():
    """By the sentence that somebody who updates the bounds needs."""
    version = peft.__version__
    assert Name("peft.tuners.tuners_utils:BaseTuner._gone", "merging").fault() == (
        f"peft {version} has moved peft.tuners.tuners_utils:BaseTuner._gone, on which stands: merging."
    )
    assert Name("peft.nowhere:BaseTuner", "merging").fault().startswith(f"peft {version} has moved peft.nowhere")
    changed = Name("peft.utils.other:get_pattern_key", "ranks by pattern", ("patterns", "key")).fault()
    assert "calls peft.utils.other:get_pattern_key with ('pattern_keys', 'key_to_match')" in changed


def _unpromised(file):
    """`module:name` of what a file takes from inside of other packages."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            package, _, inside = node.module.partition(".")
            promised = inside in (
                "",
                "nn",
                "nn.functional",
                "errors",
                "utils.data",
                "utils.hooks",
                "autograd.function",
            )
            for alias in node.names:
                if package in ("peft", "transformers", "accelerate", "huggingface_hub", "torch") and (
                    not promised or alias.name.startswith("_")
                ):
                    yield f"{node.module}:{alias.name}"
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            text = ast.unparse(node)
            if text.startswith(("torch.", "transformers.", "peft.")) and isinstance(
                node.value, ast.Name | ast.Attribute
            ):
                yield text


def test_the_table_is_whole():
    """Whatever the package takes from inside of another one is in it."""
    known = {name.path for name in TABLE}
    known |= {path.partition(".")[0] if ":" not in path else path for path in known}
    dotted = {path.replace(":", ".") for path in known}
    missing = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for used in _unpromised(file):
            whole = used.replace(":", ".")
            if not any(
                path == whole or path.startswith(f"{whole}.") or whole.startswith(f"{path}.") for path in dotted
            ):
                missing.append(f"{file.relative_to(PACKAGE)}: {used}")
    assert missing == []


def test_where_checkpoint_functions_lie():
    """transformers keeps a block's in one attribute, torch's wrapper its own in another."""
    model = base_model("bert")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert "_gradient_checkpointing_func" in model.encoder.layer[0].__dict__
    wrapper = checkpoint_wrapper(nn.Linear(2, 2))
    assert "checkpoint_fn" in wrapper.__dict__
    assert hasattr(wrapper, "_checkpoint_wrapped_module")


def test_how_peft_finds_an_adapter_per_row():
    """`adapter_names` reach a tuner that has the hook, else they are dropped."""
    source = inspect.getsource(peft.PeftModel._enable_peft_forward_hooks)
    assert "base_model._enable_peft_forward_hooks" in source


def test_how_accelerate_marks_a_module_that_it_moves():
    """By its hook, which says where it computes."""
    layer = add_hook_to_module(nn.Linear(2, 2), AlignDevicesHook(execution_device="cpu"))
    assert layer._hf_hook.execution_device == "cpu"


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_upper_bounds(package):
    """Packages whose inside is used have one, so that a later release breaks no fresh installation."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    (requirement,) = (each for each in map(Requirement, project["dependencies"]) if each.name == package)
    assert {"<", ">="} == {part.operator for part in requirement.specifier}
