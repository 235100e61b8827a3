"""Trains a small vocoder on a synthetic voice in minutes, without data and without a GPU.

    make demo            # creates .venv, installs, and runs python demo/learn_a_voice.py

eSpeak NG synthesises 60 sentences, and train.py trains a vocoder on 56 of them from scratch. On the
other four, evaluate.py compares it with the weights of pretrained/frame_v2_universal, which were
trained on real voices. Every step is a command that a user could type, and it is printed. The
results are in demo_output/: listen on demo_output/index.html and read demo_output/report.md.

This is a demonstration, not a vocoder for use: the voice is synthetic and the training is short.
"""

import ctypes
import functools
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts
from checkpoint import checkpoint_path, checkpoint_steps
from distributed import computes_in_bfloat16, select_device
from env import UserError
from utils import command_line, command_parser, positive, say

ROOT = Path(__file__).parents[1]
PRETRAINED_DIR = ROOT / "pretrained/frame_v2_universal"
CONFIG = ROOT / "configs/frame_v2.json"
CONFIG_CHANGES = {"batch_size": 8, "lr_decay": 0.99}  # an epoch has only seven updates
CHECKPOINT_INTERVAL = 100  # steps
VOICE = "en+f3"
HELD_OUT = 4  # the last sentences of SENTENCES, on which train.py does not train
# The columns of the table, by evaluate.py's names.
SHOWN_METRICS = ("mel_l1", "pesq_wb", "stoi", "vuv_f1")

SENTENCES = """\
The kettle began to sing long before anyone was awake.
She folded the map twice and slid it under the lamp.
Nine grey geese flew low across the frozen lake.
Whoever painted that door must have loved the colour blue.
Rain drummed on the tin roof until the gutters overflowed.
He measured the plank, marked it, and measured it again.
The choir practised softly in the room above the bakery.
Fresh bread and strong coffee are reason enough to get up.
A narrow path winds between the orchard and the old mill.
The judge asked for silence, and for once the crowd obeyed.
My uncle repairs violins in a shed behind his house.
Those boxes are heavier than they look, so bend your knees.
Vera bought five yellow tulips and a very large vase.
The ferry leaves at half past six, weather permitting.
Nobody could explain why the clock had stopped at noon.
Thick fog swallowed the bridge, then the street, then the square.
He whistled a tune that his grandmother used to hum.
Ship the parcel today, or the birthday will be over.
The children chased a paper kite along the empty beach.
A good question is often worth more than a quick answer.
The engine coughed, shuddered, and finally came to life.
Their garden grows beans, garlic, pumpkins, and one proud rose.
You may borrow the ladder if you bring it back by Thursday.
Snow had covered every footprint by the time we returned.
The teacher drew a perfect circle without looking at the board.
Old letters smell of dust, ink, and other people's summers.
The goat jumped the fence as if it had never been there.
I would rather walk an hour than wait ten minutes for the bus.
Bright lanterns hung from the branches of the chestnut tree.
The pilot's voice was calm, which worried some of us more.
Please close the window; the papers are flying everywhere.
Three fishermen argued about the size of a single fish.
Winter came early, and the harbour froze from shore to shore.
The museum keeps its oldest treasure in a plain wooden drawer.
She laughed so hard that the cat left the room.
A thousand small mistakes had made him a careful cook.
The train to the coast was late, crowded, and cheerful.
Which of these keys opens the cupboard under the stairs?
He poured the honey slowly and watched it find its level.
The mountain looked close, but it took them all day to reach it.
Every village on this road has its own way of making cheese.
The author crossed out the last chapter and began again.
Dark clouds gathered over the valley, yet no rain fell.
We rowed to the island, ate our plums, and rowed home.
The shopkeeper weighed the nails and wrapped them in newspaper.
Some birds sing at dawn; this one prefers the middle of the night.
The bicycle was rusty, but its bell rang clear as glass.
Just beyond the hedge, a fox was watching the henhouse.
The nurse read the chart, smiled, and opened the curtains.
Twelve candles flickered in the draught from the chapel door.
Put the blue cup on the shelf and the green one in the sink.
The river bends sharply here, and the current is treacherous.
His reply was short, polite, and entirely useless.
On quiet evenings you can hear the quarry two miles away.
The tailor chalked a line and reached for his longest scissors.
They planted oaks that only their grandchildren would climb.
A voice can be drawn as a picture and the picture spoken aloud.
The lighthouse keeper counted the waves and wrote the number down.
Could you measure how much of the music was lost on the way?
Before the machine could speak, it had to learn how to listen.
""".splitlines()


# ----------------------------------------------------------------------------------- synthetic data


@functools.cache
def load_espeak() -> tuple[ctypes.CDLL, int]:
    """Returns the eSpeak NG library of the wheel `espeakng-loader` and its sampling rate in Hz.

    The result is cached: eSpeak NG 1.52 reads freed memory when it is initialised twice.

    Raises:
        UserError: the wheel is missing or its library cannot be loaded.
    """
    try:
        import espeakng_loader

        library = ctypes.CDLL(espeakng_loader.get_library_path())
    except (ImportError, OSError) as error:
        raise UserError(
            f"eSpeak NG cannot be loaded ({error}); run: pip install espeakng-loader"
        ) from None
    synchronous, data = 2, str(espeakng_loader.get_data_path()).encode()
    return library, library.espeak_Initialize(synchronous, 0, data, 0)


class Espeak:
    """The eSpeak NG synthesiser with one voice.

    Raises:
        UserError: the library does not start or does not have the voice.
    """

    def __init__(self, voice: str):
        self.library, self.sampling_rate = load_espeak()
        if self.sampling_rate <= 0 or self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(f"eSpeak NG does not start with the voice {voice!r}")
        self.pieces: list[np.ndarray] = []
        prototype = (ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = ctypes.CFUNCTYPE(*prototype)(
            self._receive
        )  # the library keeps no reference
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples, count: int, _events) -> int:
        if samples and count > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # continue

    def synthesize(self, sentence: str) -> np.ndarray:
        """Returns the int16 samples [N] of a sentence, at `sampling_rate`."""
        self.pieces.clear()
        text, utf8 = sentence.encode(), 1
        self.library.espeak_Synth(text, len(text) + 1, 0, 1, 0, utf8, None, None)
        self.library.espeak_Synchronize()
        return np.concatenate(self.pieces)


def write_corpus(folder: Path) -> float:
    """Writes SENTENCES as wavs, and the two file lists; returns the seconds of speech."""
    espeak, seconds, lines = Espeak(VOICE), 0.0, []
    for name in ("wavs", "held_out"):
        (folder / name).mkdir(parents=True)
    for i, sentence in enumerate(SENTENCES, start=1):
        path, wav = folder / f"wavs/sentence{i:02}.wav", espeak.synthesize(sentence)
        soundfile.write(path, wav, espeak.sampling_rate)
        seconds += len(wav) / espeak.sampling_rate
        lines.append(f"{path.stem}|{sentence}\n")
        if i > len(SENTENCES) - HELD_OUT:
            shutil.copy(path, folder / "held_out")
    (folder / "training.txt").write_text("".join(lines[:-HELD_OUT]))
    (folder / "validation.txt").write_text("".join(lines[-HELD_OUT:]))
    return seconds


# ----------------------------------------------------------------------------------- the commands


def run_script(script: str, *flags: object, seconds: float | None = None) -> None:
    """Prints `python <script> <flags>` and runs it; interrupts it after `seconds` as Ctrl-C does.

    Raises:
        UserError: the script failed.
    """
    words = [script, *map(str, flags)]
    say(f"\n$ python {shlex.join(words)}")
    process = subprocess.Popen([sys.executable, str(ROOT / script), *words[1:]])
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        status = process.wait()
    interrupted = 128 + signal.SIGINT
    if status not in (0, interrupted) or (status == interrupted and seconds is None):
        raise UserError(f"{script} failed with exit status {status}; its message is printed above")


def train(folder: Path, minutes: float) -> None:
    """Runs train.py on the corpus for `minutes`."""
    config = json.loads(CONFIG.read_text()) | CONFIG_CHANGES
    (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n")
    run_script(
        "train.py",
        *("--config", folder / "config.json", "--checkpoint_path", folder / "cp"),
        *("--input_wavs_dir", folder / "wavs"),
        *("--input_training_file", folder / "training.txt"),
        *("--input_validation_file", folder / "validation.txt"),
        *("--precision", "bf16" if computes_in_bfloat16(select_device("auto")) else "fp32"),
        *("--checkpoint_interval", CHECKPOINT_INTERVAL, "--keep_checkpoints", 1),
        *("--validation_interval", CHECKPOINT_INTERVAL, "--stdout_interval", 50),
        seconds=60 * minutes,
    )


def resynthesize(folder: Path, checkpoint: Path, name: str) -> None:
    """Runs inference.py on the held-out sentences; writes to `<folder>/<name>`."""
    run_script(
        "inference.py",
        *("--input_wavs_dir", folder / "held_out", "--output_dir", folder / name),
        *("--checkpoint_file", checkpoint),
    )


def stream(folder: Path, checkpoint: Path) -> None:
    """Runs meldataset.py, and inference_e2e.py with 32 frames (0.37 s) at a time."""
    run_script(
        "meldataset.py",
        *("--config", checkpoint.parent / "config.json"),
        *("--input_wavs_dir", folder / "held_out", "--output_dir", folder / "mels"),
    )
    run_script(
        "inference_e2e.py",
        *("--input_mels_dir", folder / "mels", "--output_dir", folder / "streamed"),
        *("--checkpoint_file", checkpoint, "--chunk_frames", 32),
    )


def evaluate(folder: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """Runs evaluate.py on the folders `names`; returns the mean of each metric by name."""
    run_script(
        "evaluate.py",
        *("--reference_dir", folder / "held_out"),
        *("--generated_dir", *(folder / name for name in names)),
        *("--config", folder / "config.json", "--output", folder / "results.json"),
        *("--page", folder),
    )
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    return {
        name: {metric: facts["systems"][name]["mean"] for metric, facts in metrics.items()}
        for name in names
    }


# ------------------------------------------------------------------------------------- the report


def plot_losses(logs: Path, path: Path) -> None:
    """Plots the energy distance of training and the mel error of validation over steps."""
    events = EventAccumulator(str(logs))
    events.Reload()
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for tag in ("training/gen_loss_energy", "validation/mel_spec_error"):
        points = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
        axes.plot([p.step for p in points], [p.value for p in points], label=tag, marker=".")
    axes.set(xlabel="steps", title="Losses that train.py logged")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def metric_table(means: dict[str, dict[str, float]]) -> str:
    """Returns SHOWN_METRICS of each system as a Markdown table."""
    shown = [name for name in SHOWN_METRICS if any(name in row for row in means.values())]
    lines = [f"| system | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    for system, row in means.items():
        cells = ["" if row.get(name) is None else f"{row[name]:.3f}" for name in shown]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(folder: Path, table: str, seconds: float) -> None:
    """Writes report.md and its plot."""
    plot_losses(folder / "cp/logs", folder / "curve.png")
    (folder / "report.md").write_text(
        f"# A vocoder trained in minutes\n\nThe table compares {HELD_OUT} sentences that were not "
        f"used for training with their resynthesis from mels:\n\n{table}\n\n"
        "Lower is better for `mel_l1`, higher for the others. `python evaluate.py --help` defines "
        "each metric. Listen to the sentences on [index.html](index.html).\n\n"
        "![losses over steps](curve.png)\n\n"
        f"The whole demonstration took {seconds / 60:.1f} minutes. The voice is synthetic, the "
        f"corpus has {len(SENTENCES) - HELD_OUT} sentences, and no discriminators were used. A "
        "vocoder for real speech needs hours of recordings; see the README.\n"
    )


def main() -> None:
    """Runs the demonstration."""
    parser = command_parser(
        "Makes a small corpus with eSpeak NG, trains a vocoder on it and evaluates the result.",
        example="python demo/learn_a_voice.py --minutes 2",
    )
    parser.add_argument(
        "--minutes", type=positive, default=3, metavar="N", help="duration of the training"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        default="demo_output",
        help="folder for all results; it must not exist",
    )
    a = parser.parse_args()
    if a.output_dir.exists():
        raise UserError(f"{a.output_dir}: exists; remove it or pass another --output_dir")
    run(a.output_dir, a.minutes)


def run(folder: Path, minutes: int) -> None:
    """Runs the six steps and writes all results to `folder`.

    Raises:
        UserError: eSpeak NG is missing, a script failed, or the training completed no step.
    """
    begin = time.monotonic()
    say(f"1. Data: eSpeak NG synthesises {len(SENTENCES)} sentences (seconds).")
    seconds = write_corpus(folder)
    say(f"   {seconds / 60:.1f} minutes of speech in {folder}/wavs; {HELD_OUT} are held out.")
    say("\n2. The held-out sentences with pretrained weights, trained on other voices (seconds).")
    resynthesize(folder, next(PRETRAINED_DIR.glob("g_*")), "pretrained")
    say(
        f"\n3. Training: a vocoder of a million parameters, from scratch, for {minutes} "
        "minutes. The Mel-Spec. Error should fall."
    )
    train(folder, minutes)
    saved = checkpoint_steps(folder / "cp", "g")
    if not saved:
        raise UserError(f"no step was completed in {minutes} minutes; raise --minutes")
    say("\n4. The held-out sentences with the first and the last checkpoint (seconds).")
    names = ["pretrained"]
    for steps in dict.fromkeys((saved[0], saved[-1])):
        names.append(f"after_{steps}_steps")
        checkpoint = checkpoint_path(folder / "cp", "g", steps)
        resynthesize(folder, checkpoint, names[-1])
    say("\n5. The same from mels, 32 frames at a time, as in streaming (seconds).")
    stream(folder, checkpoint)
    say("\n6. Metrics against the original sentences, and a page with all clips (a minute).")
    table = metric_table(evaluate(folder, names))
    write_report(folder, table, time.monotonic() - begin)
    page = (folder / "index.html").resolve()
    say(f"\n{table}\n\nListen: open {page} in a browser. The report is {folder}/report.md.")


if __name__ == "__main__":
    command_line(main)
