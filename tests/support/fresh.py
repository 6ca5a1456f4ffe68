"""New processes, forked from one that has imported what they need: by themselves each takes four seconds for that."""

import multiprocessing
import sys

import torch


multiprocessing.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "transformers.trainer",
        "transformers.models.ast.modeling_ast",
        "transformers.models.bert.modeling_bert",
        "transformers.models.vit.modeling_vit",
        "peft_read",
    ]
)
SERVER = multiprocessing.get_context("forkserver")


def run_ranks(target, *arguments, processes=2):
    """Call `target(rank, *arguments)` in each of several new processes; what one of them raises is raised here."""
    torch.multiprocessing.start_processes(target, arguments, nprocs=processes, start_method="forkserver")


def run_code(code, *arguments):
    """Run a script's code in a new process, with its arguments in `sys.argv`."""
    run_ranks(_run, code, list(map(str, arguments)), processes=1)


def _run(rank, code, arguments):
    sys.argv = ["-c", *arguments]
    torch.set_num_threads(1)
    exec(compile(code, "<a new process>", "exec"), {"__name__": "__main__"})
