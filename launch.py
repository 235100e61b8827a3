"""From the command line of train.py or distill.py to its run: processes, data, state.

launch_or_train(arguments, prepare)    # under torchrun, a process for each GPU
  -> train                             # reads the data, resumes or begins
    -> loop.run
"""

import argparse
import contextlib
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

from audio import mel_warning
from checkpoint import (
    State,
    agree_on_steps,
    locked,
    resume,
    run_meta,
    warm_start,
)
from distributed import (
    init_processes,
    is_lost_connection,
    leave_processes,
    raise_on_all_ranks,
    rank,
    select_device,
    speed_up_cpu,
    world_size,
)
from env import Config, UsageError, UserError, load_config, one_line
from loop import SHOWN_CLIPS, Update, own_share, run
from meldataset import MelDataset
from monitor import describe
from utils import (
    atomic_write,
    boolean,
    positive,
    remove_temporary_files,
    say,
    say_if_slow,
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
    """Runs this command under torchrun, as `processes` processes; returns the exit status.

    Raises:
        UserError: a process was killed.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds, to save in
    logging.disable(logging.CRITICAL)  # of torchrun: the run says what there is to say
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        # nohup, which torchrun undoes by a handler of its own. A blocked signal reaches no handler,
        # here and in the processes, which inherit this.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        torch.distributed.run.main(["--standalone", f"--nproc_per_node={processes}", *sys.argv])
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        # One that was killed says more than those that missed it, whom torchrun ends by SIGTERM.
        until = error.get_first_failure()[1].timestamp + 1  # second
        failures = [each for each in error.failures.items() if each[1].timestamp <= until]
        number, failure = min(
            failures, key=lambda each: (each[1].exitcode == -signal.SIGTERM, each[1].exitcode >= 0)
        )
        if failure.exitcode >= 0:
            return failure.exitcode
        raise UserError(
            f"process {number} was ended by {signal.Signals(-failure.exitcode).name} (too little "
            "memory, perhaps); run the command again to go on from the last checkpoint"
        ) from None
    return 0


# Gives a fresh state, and what gives the update once that stands where the run begins.
Prepare = Callable[[argparse.Namespace, Config, torch.device], tuple[State, Callable[[], Update]]]


def launch_or_train(a: argparse.Namespace, prepare: Prepare) -> int:
    """Trains as the command line says, in a process for each GPU; returns the exit status."""
    device = select_device(a.device)
    gpus = torch.cuda.device_count() if a.device in ("auto", "cuda") else 0
    processes = gpus if gpus > 1 and "RANK" not in os.environ else world_size()
    launches = processes > world_size()
    h, config = load_config(a.config, None if launches else say), Path(a.config).read_bytes()
    if h.batch_size % processes:
        raise UsageError(
            f"{a.config}: batch_size = {h.batch_size}: expected a multiple of {processes}, the "
            "number of processes"
        )
    if launches:
        return launch(processes)
    if device.type == "cpu":
        speed_up_cpu()
    say_if_slow(a.precision, device)
    init_processes(device)
    try:
        status = train(a, h, device, prepare, config)
    except UserError:
        leave_processes()  # which agree on every error
        raise
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise UserError(
            "another process of the run has ended or cannot be reached; run the command again to "
            "go on from the last checkpoint"
        ) from None
    leave_processes()
    return status


def read_data(a: argparse.Namespace, h: Config) -> tuple[MelDataset, MelDataset]:
    """The training and the validation clips.

    Raises:
        UserError: too few, or one that is unusable.
    """
    mels_dir = a.input_mels_dir if a.fine_tuning else None
    if a.fine_tuning and not os.path.isdir(mels_dir):
        raise UserError(
            f"{mels_dir}: no such folder; expected an acoustic model's mels: give --input_mels_dir"
        )
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
    if not len(validation):
        say(f"{a.input_validation_file}: no clips, so no validation")
    if a.fine_tuning and (reason := mel_warning(clips.whole(0)[0])):
        say(one_line(f"{clips.mel_path(0)}: {reason}"))
    return clips, validation


def train(
    a: argparse.Namespace, h: Config, device: torch.device, prepare: Prepare, config: bytes
) -> int:
    """Prepares, reads the data, resumes or begins, and runs; returns the exit status.

    `config` is the text of the config as it was when the run began.
    """
    folder = Path(a.checkpoint_path)
    with raise_on_all_ranks():  # before the data, which may take long to read
        state, start = prepare(a, h, device)
    with raise_on_all_ranks():
        clips, validation = read_data(a, h)
    with contextlib.ExitStack() as until_the_end:
        with raise_on_all_ranks():
            until_the_end.enter_context(locked(folder))
        with raise_on_all_ranks():
            begin(a, state, config)
        agree_on_steps(state)
        with raise_on_all_ranks():
            describe(state, clips, a.config, folder)
        return run(a, state, clips, validation, start())


def begin(a: argparse.Namespace, state: State, config: bytes) -> None:
    """Resumes or begins with `state`, and writes the config beside the checkpoints."""
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
        with atomic_write(folder / "config.json") as temporary:
            temporary.write_bytes(config)
