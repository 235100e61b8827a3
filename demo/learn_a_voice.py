"""Shows MISRNet at work in about five minutes, with no data and no GPU.

    make demo            # makes .venv, installs, and runs python demo.py

eSpeak NG speaks sentences; train.py teaches a vocoder this voice, from nothing; inference.py,
inference_e2e.py and evaluate.py show what was learnt, on sentences that were held out, beside
weights in pretrained/ that learnt from real voices. Every step is a command that you could type,
and is printed. All of it lands in demo/: listen to it on demo/index.html, read demo/report.md.

It is a demonstration: a synthetic voice, three minutes of it, a small generator, minutes of
training. A vocoder for real speech takes a corpus such as LJSpeech and days on a GPU.
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

HERE = Path(__file__).parent
PRETRAINED = HERE / "pretrained/frame_v2_universal/g_00044824"
CONFIG = HERE / "configs/frame_v2.json"
CHANGES = {"batch_size": 8, "lr_decay": 0.99}  # each epoch is seven updates
PARAMETERS = "a million"
CHECKPOINT_INTERVAL = 100  # steps
VOICE = "en+f3"
HELD_OUT = 4  # sentences, the last of SENTENCES
SHOWN_METRICS = ("mel_l1", "pesq_wb", "stoi", "vuv_f1")  # of evaluate.py's

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


# ------------------------------------------------------------------------------------- the corpus


@functools.cache
def load_espeak() -> tuple[ctypes.CDLL, int]:
    """eSpeak NG's library, from the wheel `espeakng-loader`, and its sampling rate.

    Once a process: initialised again, eSpeak NG 1.52 reads memory that it has freed, and may crash.

    Raises:
        UserError: the wheel is missing or its library cannot be loaded here.
    """
    try:
        import espeakng_loader

        library = ctypes.CDLL(espeakng_loader.get_library_path())
    except (ImportError, OSError) as error:
        raise UserError(
            f"eSpeak NG cannot be loaded ({error}); try: pip install espeakng-loader. "
            "Training needs no eSpeak: see the README for data of your own"
        ) from None
    synchronous, data = 2, str(espeakng_loader.get_data_path()).encode()
    return library, library.espeak_Initialize(synchronous, 0, data, 0)


class Espeak:
    """eSpeak NG's synthesiser, with one of its voices.

    Raises:
        UserError: it does not start.
    """

    def __init__(self, voice: str):
        self.library, self.sampling_rate = load_espeak()
        if self.sampling_rate <= 0 or self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(f"eSpeak NG does not start with the voice {voice!r}")
        self.pieces: list[np.ndarray] = []
        prototype = (ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = ctypes.CFUNCTYPE(*prototype)(self._receive)
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples, count: int, _events) -> int:
        if samples and count > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on

    def speak(self, sentence: str) -> np.ndarray:
        """16-bit samples [N] at `sampling_rate` Hz."""
        self.pieces.clear()
        text, utf8 = sentence.encode(), 1
        self.library.espeak_Synth(text, len(text) + 1, 0, 1, 0, utf8, None, None)
        self.library.espeak_Synchronize()
        return np.concatenate(self.pieces)


def write_corpus(folder: Path) -> float:
    """Speaks SENTENCES into `folder`, as wavs/ and two lists; returns the seconds of speech."""
    espeak = Espeak(VOICE)
    (folder / "wavs").mkdir(parents=True)
    ids, seconds = [f"sentence{i:02}" for i in range(1, len(SENTENCES) + 1)], 0.0
    for clip_id, sentence in zip(ids, SENTENCES, strict=True):
        wav = espeak.speak(sentence)
        soundfile.write(folder / "wavs" / f"{clip_id}.wav", wav, espeak.sampling_rate)
        seconds += len(wav) / espeak.sampling_rate
    lines = [f"{clip_id}|{text}\n" for clip_id, text in zip(ids, SENTENCES, strict=True)]
    (folder / "training.txt").write_text("".join(lines[:-HELD_OUT]))
    (folder / "validation.txt").write_text("".join(lines[-HELD_OUT:]))
    (folder / "held_out").mkdir()
    for clip_id in ids[-HELD_OUT:]:
        shutil.copy(folder / "wavs" / f"{clip_id}.wav", folder / "held_out")
    return seconds


# ----------------------------------------------------------------------------------- the commands


def run_script(script: str, *flags: object, seconds: float | None = None) -> None:
    """Prints `python <script> <flags>` and runs it, for `seconds` at most: then Ctrl-C is sent.

    Raises:
        UserError: it failed; it has said why.
    """
    words = [script, *map(str, flags)]
    say(f"\n$ python {shlex.join(words)}")
    process = subprocess.Popen([sys.executable, str(HERE / script), *words[1:]])
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        status = process.wait()
    stopped = 128 + signal.SIGINT
    if status not in (0, stopped) or (status == stopped and seconds is None):
        raise UserError(f"{script} failed with exit status {status}; what it said is above")


def train(folder: Path, minutes: float) -> None:
    """train.py on the corpus, stopped after `minutes` as a person would: with Ctrl-C."""
    config = json.loads(CONFIG.read_text()) | CHANGES
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


def vocode(folder: Path, checkpoint: Path, name: str) -> None:
    """inference.py on the held-out sentences."""
    run_script(
        "inference.py",
        *("--input_wavs_dir", folder / "held_out", "--output_dir", folder / name),
        *("--checkpoint_file", checkpoint),
    )


def compare(folder: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """evaluate.py on what was vocoded, with a page to hear it; the means by name and metric."""
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


def stream(folder: Path, checkpoint: Path) -> None:
    """meldataset.py, and inference_e2e.py in chunks of a third of a second."""
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


# ------------------------------------------------------------------------------------- the report


def draw_curve(logs: Path, path: Path) -> None:
    """The mel loss of training and the mel error of validation, step by step."""
    events = EventAccumulator(str(logs))
    events.Reload()
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for tag in ("training/gen_loss_mel", "validation/mel_spec_error"):
        points = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
        axes.plot([p.step for p in points], [p.value for p in points], label=tag, marker=".")
    axes.set(xlabel="steps", title="What train.py logged")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def metric_table(means: dict[str, dict[str, float]]) -> str:
    """SHOWN_METRICS of each system, by its name, in markdown."""
    shown = [name for name in SHOWN_METRICS if any(name in row for row in means.values())]
    lines = [f"| system | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    for system, row in means.items():
        cells = ["" if row.get(name) is None else f"{row[name]:.3f}" for name in shown]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(folder: Path, table: str, seconds: float) -> None:
    """report.md and the curve."""
    draw_curve(folder / "cp/logs", folder / "curve.png")
    (folder / "report.md").write_text(
        f"# What MISRNet learnt in minutes\n\n{HELD_OUT} sentences that it never heard, vocoded "
        f"from their mels:\n\n{table}\n\n"
        "`mel_l1`: lower is better; the others: higher. `python evaluate.py --help` says what "
        "each is. Hear and see them: [index.html](index.html).\n\n"
        "![learning curve](curve.png)\n\n"
        f"The whole demonstration took {seconds / 60:.1f} minutes. It is one: a synthetic voice, "
        f"{len(SENTENCES) - HELD_OUT} sentences, a small generator, no adversarial losses. A "
        "vocoder for real speech takes a corpus such as LJSpeech (24 hours) and days on a GPU: "
        "`python train.py --config config_v1.json`.\n"
    )


def main() -> int:
    """The demonstration, stage by stage."""
    parser = command_parser(
        "Makes a small corpus with eSpeak NG, trains a vocoder on it and shows what was learnt.",
        example="python demo.py --minutes 2",
    )
    parser.add_argument("--minutes", type=positive, default=4, metavar="N", help="of training")
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIR", default="demo", help="must not exist yet"
    )
    a = parser.parse_args()
    folder, begin = a.output_dir, time.monotonic()
    if folder.exists():
        raise UserError(f"{folder}: exists; remove it or pass another --output_dir")
    say(f"1. A corpus: eSpeak NG speaks {len(SENTENCES)} sentences (seconds).")
    seconds = write_corpus(folder)
    say(f"   {seconds / 60:.1f} minutes of speech in {folder}/wavs; {HELD_OUT} are held out.")
    say("\n2. The held-out sentences, by shipped weights, which never heard this voice (seconds).")
    vocode(folder, PRETRAINED, "shipped")
    names = ["shipped"]
    say(
        f"\n3. A vocoder of {PARAMETERS} parameters learns this voice from nothing, for "
        f"{a.minutes} minutes; its Mel-Spec. Error should fall."
    )
    train(folder, a.minutes)
    saved = checkpoint_steps(folder / "cp", "g")
    if not saved:
        raise UserError(f"not one step in {a.minutes} minutes; raise --minutes")
    say("\n4. The held-out sentences, early and at the end (seconds).")
    for steps in dict.fromkeys((saved[0], saved[-1])):
        names.append(f"after_{steps}_steps")
        checkpoint = checkpoint_path(folder / "cp", "g", steps)
        vocode(folder, checkpoint, names[-1])
    say("\n5. From mels, in chunks of a third of a second, as a stream would have them (seconds).")
    stream(folder, checkpoint)
    say("\n6. How near each comes to the sentences themselves, and a page to hear it (a minute).")
    table = metric_table(compare(folder, names))
    write_report(folder, table, time.monotonic() - begin)
    say(
        f"\n{table}\n\nListen: open {(folder / 'index.html').resolve()} in a browser. The figures "
        f"and the curve are in {folder}/report.md.\n"
        "This was a synthetic voice and minutes of training. For real speech see the README."
    )
    return 0


if __name__ == "__main__":
    command_line(main)
