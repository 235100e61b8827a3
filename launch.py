"""From the command line of train.py or distill.py to its run: processes, data, state.

launch_or_train(arguments, prepare)    # under torchrun, a process for each GPU
  -> train                             # resumes or begins
    -> loop.run
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from checkpoint import (
    State,
    average_gradients,
    build_state,
    locked,
    resume,
    run_meta,
    warm_start,
)
from distributed import (
    init_processes,
    leave_processes,
    rank,
    select_device,
    speed_up_cpu,
    world_size,
)
from env import UsageError, UserError, load_config
from loop import SHOWN_CLIPS, Update, own_share, run
from meldataset import MelDataset
from monitor import describe
from utils import (
    boolean,
    positive,
    remove_temporary_files,
    replacing,
    say,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of train.py and distill.py; HiFi-GAN's keep their names and defaults."""
    add = parser.add_argument_group("data").add_argument
    add(
        "--input_wavs_dir",
        default="LJSpeech-1.1/wavs",
        metavar="DIR",
        help="audio in any format and at any rate",
    )
    add(
        "--input_mels_dir",
        default="ft_dataset",
        metavar="DIR",
        help="<id>.npy [num_mels, T], for --fine_tuning",
    )
    add(
        "--input_training_file",
        default="LJSpeech-1.1/training.txt",
        metavar="FILE",
        help="a line a clip: id|...",
    )
    add(
        "--input_validation_file",
        default="LJSpeech-1.1/validation.txt",
        metavar="FILE",
        help="the same",
    )
    add(
        "--fine_tuning",
        type=boolean,
        default=False,
        metavar="True|False",
        help="learn from an acoustic model's mels in --input_mels_dir",
    )
    add = parser.add_argument_group("model").add_argument
    add("--config", required=True, metavar="FILE", help="JSON config, HiFi-GAN's format")
    add(
        "--checkpoint_path",
        default="cp_misrnet",
        metavar="DIR",
        help="to resume from and to save to",
    )
    add(
        "--warm_start",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="g_* and do_* files of the family, whose matching weights a new run begins with",
    )
    add = parser.add_argument_group("length and cadence").add_argument
    add(
        "--training_epochs",
        type=positive,
        default=3100,
        metavar="N",
        help="stop after so many epochs",
    )
    add(
        "--training_steps",
        type=positive,
        metavar="N",
        help="stop after so many updates in all, if that comes first",
    )
    add(
        "--stdout_interval",
        type=positive,
        default=5,
        metavar="N",
        help="updates from one line on the terminal to the next",
    )
    add(
        "--checkpoint_interval",
        type=positive,
        default=5000,
        metavar="N",
        help="updates from one pair of g_* and do_* to the next",
    )
    add(
        "--summary_interval",
        type=positive,
        default=100,
        metavar="N",
        help="updates from one entry in TensorBoard to the next",
    )
    add(
        "--validation_interval",
        type=positive,
        default=1000,
        metavar="N",
        help="updates from one validation to the next",
    )
    add(
        "--keep_checkpoints",
        type=positive,
        default=3,
        metavar="N",
        help="of do_* the newest N stay; every g_* stays",
    )
    add(
        "--eval_metrics",
        action="store_true",
        help="at each validation also PESQ, STOI and what else evaluate.py measures, of the first "
        f"{SHOWN_CLIPS} clips, in the background",
    )
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the convolutions")
    add("--compile", action="store_true", help="torch.compile the models")


def launch(processes: int) -> int:
    """Runs this command under torchrun, as `processes` processes; returns the exit status."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds, to save in
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the run says it
    options = ["--standalone", f"--nproc_per_node={processes}"]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup, which torchrun would undo
        options.append("--signals_to_handle=SIGTERM,SIGINT,SIGQUIT")
    try:
        torch.distributed.run.main([*options, *sys.argv])
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return 0


def launch_or_train(
    a: argparse.Namespace, prepare: Callable[[argparse.Namespace, State], Update]
) -> int:
    """Trains as the command line says, in a process for each GPU; returns the exit status.

    `prepare` is given a fresh state, to which it may add, and gives the update.
    """
    h, config = load_config(a.config, say), Path(a.config).read_bytes()
    device = select_device(a.device)
    gpus = torch.cuda.device_count() if a.device in ("auto", "cuda") else 0
    processes = gpus if gpus > 1 and "RANK" not in os.environ else world_size()
    if h.batch_size % processes:
        raise UsageError(
            f"{a.config}: batch_size = {h.batch_size}: expected a multiple of {processes}, the "
            "number of processes"
        )
    if processes > world_size():
        return launch(processes)
    if device.type == "cpu":
        speed_up_cpu()
    mels_dir = a.input_mels_dir if a.fine_tuning else None
    clips, validation = (
        MelDataset(h, file_list, a.input_wavs_dir, mels_dir)
        for file_list in (a.input_training_file, a.input_validation_file)
    )
    if len(clips) < h.batch_size:
        raise UserError(
            f"{a.input_training_file}: {len(clips)} clips, fewer than batch_size = {h.batch_size} "
            f"of {a.config}; lower it or add clips"
        )
    for index in own_share(validation):  # an unusable clip shall end the run now, not hours later
        validation.whole(index)
    with locked(a.checkpoint_path):
        init_processes(device)
        state = build_state(h, device, a.precision)
        status = train(a, state, prepare(a, state), config, clips, validation)
    leave_processes()
    return status


def train(
    a: argparse.Namespace,
    state: State,
    update: Update,
    config: bytes,
    clips: MelDataset,
    validation: MelDataset,
) -> int:
    """Resumes or begins, and runs.

    `config` is the text of the config as it was when the run began.
    """
    torch.backends.cudnn.benchmark = True  # all segments have one size
    torch.backends.cudnn.allow_tf32 = True  # fp32 convolutions on GPUs; other products are exact
    folder = Path(a.checkpoint_path)
    state.meta = run_meta(config)
    if not resume(state, folder):
        warm_start(state, a.warm_start)
    elif a.warm_start:
        say(f"--warm_start not used: {folder} holds a run of its own")
    if rank() == 0:
        remove_temporary_files(folder)
        with replacing(folder / "config.json") as temporary:
            temporary.write_bytes(config)
    if a.compile:
        state.generator.compile()
        state.discriminators.compile()
    average_gradients(state)
    describe(state, clips, a.config, folder)
    return run(a, state, clips, validation, update)
