"""One of two processes that train with DeepSpeed on CPUs, as `accelerate launch --config_file zero3.yaml` starts them.

DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 tests/support/zero.py zero3 FOLDER
"""

import os
import sys
import warnings
from pathlib import Path
from unittest import mock

import devices
import torch
import yaml
from accelerate import DistributedType, PartialState
from accelerate.utils import DeepSpeedPlugin, patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env


def main(configuration, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arguments = devices.launch_arguments(configuration, "--main_process_port", "0")
    given = yaml.safe_load((devices.CONFIGURATIONS / f"{configuration}.yaml").read_text())["deepspeed_config"]
    arguments.deepspeed_fields_from_accelerate_config = ",".join(given)  # as `accelerate launch` does
    environment = prepare_deepspeed_cmd_env(arguments)[1]
    environment = {key: value for key, value in environment.items() if key.startswith("ACCELERATE_")}
    post_init = DeepSpeedPlugin.__post_init__

    def shard_small_weights(plugin):
        """By default weights of fewer than 100,000 numbers, so all of these, are whole on every device."""
        post_init(plugin)
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    with patch_environment(**environment), mock.patch.object(DeepSpeedPlugin, "__post_init__", shard_small_weights):
        for name in devices.TRAINERS:
            # Without a backend that is named, Accelerate finds none for CPUs and counts one process.
            found = devices.run(name, folder / f"{name}-{configuration}", 2, use_cpu=False, ddp_backend="gloo")
            state = PartialState()
            assert state.distributed_type == DistributedType.DEEPSPEED, state
            assert state.num_processes == 2, state
            torch.save(found, folder / f"{name}-{configuration}-{state.process_index}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    os._exit(0)  # DeepSpeed's own end waits for a while
