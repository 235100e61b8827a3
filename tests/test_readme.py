"""README, docs/, CONTRIBUTING and model cards: commands, snippets, links, keys and messages."""

import contextlib
import functools
import importlib
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from unicodedata import category

import numpy as np
import pytest
import soundfile
import torch

import checkpoint
import evaluate
import export_onnx
import inference_e2e
import train
from checkpoint import build_state, save
from env import Config, UserError, load_config
from inference import Streamer, load_generator
from models import Generator
from tools.toy import ROOT, corpus_arguments, run_main, save_checkpoint, toy_values, write_config
from weights import to_hifigan_names

CARDS = sorted(ROOT.glob("pretrained/*/README.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*PAGES, ROOT / "CONTRIBUTING.md", *CARDS)
}
ALL = "\n".join(TEXTS.values())
MOST_WORDS = 900  # of the README and of each page of docs/, tables and citation excluded


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks in `language`; "" is a block without one."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_is_short(path):
    text = re.sub(r"^```bibtex\n.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(re.sub(r"^\|.*", "", text, flags=re.MULTILINE).split()) <= MOST_WORDS


# --- Commands

COMMANDS = {
    re.sub(r"\s+", " ", command): command.split()[1:]
    for block in blocks(ALL, "")
    for command in block.replace("\\\n", " ").splitlines()
    if re.match(r"python \S+\.py\b", command)
}
INLINE = {text: text.split()[1:] for text in re.findall(r"`(python \S+\.py\b[^`]*)`", ALL)}
RUN = [command for command, words in COMMANDS.items() if "/" not in words[0]]  # tools/ take long
SCRIPTS = sorted({words[0] for words in (COMMANDS | INLINE).values()})
FOREIGN_FLAGS = {"--shm-size", "--group_name", "--no-deps", "--matcha-vocoder"}


def module_of(script: str):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


@functools.cache
def flags_of(script: str) -> set[str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        run_main(module_of(script), "--help")
    return set(re.findall(r"^  (?:-\w, )?(--\w+)", printed.getvalue(), flags=re.MULTILINE))


@pytest.mark.parametrize("command", COMMANDS | INLINE)
def test_a_command_has_flags_that_exist(command):
    script, *words = (COMMANDS | INLINE)[command]
    assert {word for word in words if word.startswith("--")} <= flags_of(script) | {"--help"}


def test_flags_in_the_text_exist():
    named = set(re.findall(r"`(--[\w-]+)", ALL)) - FOREIGN_FLAGS
    assert named <= set().union(*map(flags_of, SCRIPTS)) | {"--help"}


def test_make_has_the_targets():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"\bmake (\w+)`", ALL)) <= set(targets)


def trained(folder: Path, config: Path, steps: int) -> None:
    """Writes a pair of checkpoints with their config."""
    folder.mkdir(parents=True)
    shutil.copy(config, folder / "config.json")
    state = build_state(load_config(config), torch.device("cpu"))
    state.steps = steps
    save(state, folder, keep=1)


@pytest.fixture(scope="module")
def template(corpus, tmp_path_factory) -> Path:
    """A folder with all files that the commands name, at toy size."""
    tmp_path = tmp_path_factory.mktemp("template")
    for path in (*ROOT.glob("config_*.json"), *ROOT.glob("configs/*.json")):
        name = str(path.relative_to(ROOT))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_config(tmp_path / name, name)
    for name in ("LJSpeech-1.1", "my_voice"):
        shutil.copytree(corpus, tmp_path / name)
    shutil.copy(tmp_path / "configs/frame_v2.json", tmp_path / "my_voice/config.json")
    for name in ("test_files", "generated_files", "generated_misr", "test_mel_files", "ft_dataset"):
        (tmp_path / name).mkdir()
    for path in sorted((corpus / "wavs").glob("*.wav")):
        mel = np.full((80, soundfile.info(path).frames // 256), -5.0)
        np.save(tmp_path / f"ft_dataset/{path.stem}.npy", mel)
    for name in ("clip5", "clip6"):
        shutil.copy(tmp_path / f"ft_dataset/{name}.npy", tmp_path / "test_mel_files")
        shutil.copy(corpus / f"wavs/{name}.wav", tmp_path / "test_files")
        for folder in ("generated_files", "generated_misr"):
            shutil.copy(corpus / f"wavs/{name}.wav", tmp_path / folder / f"{name}_generated.wav")
    trained(tmp_path / "cp_misrnet", tmp_path / "configs/frame_v2.json", steps=500_000)
    trained(tmp_path / "hifigan", tmp_path / "configs/hifigan_v1.json", steps=2_500_000)
    for card in CARDS:
        folder = str(card.parent.relative_to(ROOT))
        # frame_v3 is exported here, which takes a minute even at toy size; a MISR takes its place.
        config = "config_v2.json" if "frame_v3" in folder else f"{folder}/config.json"
        trained(tmp_path / folder, write_config(tmp_path / "shipped.json", config), steps=57_768)
    return tmp_path


@pytest.fixture
def home(template, tmp_path, monkeypatch) -> Path:
    """A copy of `template`, in which a command runs."""
    folder = shutil.copytree(template, tmp_path / "home")
    monkeypatch.chdir(folder)
    return folder


def expanded(words: list[str]) -> list[str]:
    """The words of a command, with `*` expanded as a shell does."""
    return [str(each) for w in words for each in (sorted(Path().glob(w)) if "*" in w else [w])]


OUTPUTS = {  # files that a script must have written
    "train.py": ("g_*1", "do_*1"),
    "distill.py": ("g_*1", "do_*1"),
    "inference.py": ("generated_*/clip[56]_generated.wav",),
    "inference_e2e.py": ("generated_files_from_mel/clip[56]_generated_e2e.wav",),
    "meldataset.py": ("*.npy",),
    "export_onnx.py": ("misrnet.onnx",),
}


@pytest.mark.parametrize("command", RUN)
def test_a_command_does_what_the_text_says(home, monkeypatch, command):
    script, *words = COMMANDS[command]
    words = expanded(words)
    if "--help" in words:
        return
    flags = dict(itertools.pairwise(words))
    patterns = OUTPUTS.get(script, ())
    if script in ("train.py", "distill.py"):
        folder = flags.get("--checkpoint_path", "cp_misrnet")
        done = max(checkpoint.checkpoint_steps(folder, "g"), default=0)
        words += ["--training_steps", str(done + 1), "--device", "cpu"]
    elif script == "inference.py":
        shutil.rmtree(flags.get("--output_dir", "generated_files"))
    elif script == "evaluate.py":
        patterns = [flags["--output"]] if "--output" in flags else []
        patterns += [f"{flags['--page']}/index.html"] if "--page" in flags else []
        words += ["--workers", "1"]
        quick = [metric for metric in evaluate.METRICS if metric.name == "mel_l1"]
        monkeypatch.setattr(evaluate, "METRICS", quick)
    elif "--output_dir" in flags:
        shutil.rmtree(flags["--output_dir"], ignore_errors=True)
    assert run_main(module_of(script), *words) == 0
    assert patterns
    assert all(list(home.rglob(pattern)) for pattern in patterns)


# --- Python

SNIPPETS = {name: found for name, text in TEXTS.items() if (found := blocks(text, "python"))}
BEFORE = """
import numpy, torch
mel = torch.from_numpy(numpy.load("mel.npy")).float()
played = []
play = played.append
"""
AFTER = """
assert all(torch.as_tensor(piece).isfinite().all() for piece in played)
assert sum(map(len, played)) % (70 * 256) == 0  # the whole mel, once or more
"""


@pytest.fixture
def folder(tmp_path, exported):
    """The files that the snippets name: a checkpoint, its ONNX form, a mel and a wav."""
    shutil.copytree(exported, tmp_path / "cp_misrnet")
    shutil.move(tmp_path / "cp_misrnet/misrnet.onnx", tmp_path)
    stream = ("--stream", 4, "--output", tmp_path / "misrnet_stream.onnx")
    checkpoint_file = tmp_path / "cp_misrnet/g_00500000"
    assert run_main(export_onnx, "--checkpoint_file", checkpoint_file, *stream) == 0
    mel = np.random.default_rng(0).uniform(-11, 1, (80, 70)).astype(np.float32)
    np.save(tmp_path / "mel.npy", mel)
    soundfile.write(tmp_path / "speech.wav", np.zeros(22050), 22050)
    return tmp_path


def run_python(code: str, folder: Path) -> None:
    """Runs `code` in `folder` with the repository's modules."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code.replace("path/to/misrnet", str(ROOT))]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", SNIPPETS)
def test_the_snippets_of_a_page_run_one_after_another(folder, name):
    run_python(BEFORE + "\n".join(SNIPPETS[name]) + AFTER, folder)


def test_the_onnx_snippets_need_no_torch(folder):
    snippets = [s for page in SNIPPETS.values() for s in page if "import onnxruntime" in s]
    (folder / "speech.wav").unlink()
    run_python("import sys; sys.modules['torch'] = None\n" + "\n".join(snippets), folder)
    info = soundfile.info(folder / "speech.wav")
    assert (info.samplerate, info.frames) == (22050, 70 * 256)


# --- Links


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = (h.lower() for h in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE))
    kept = ("".join(c for c in h if category(c)[0] in "LN" or c in " -_") for h in headings)
    return {each.replace(" ", "-") for each in kept}


@pytest.mark.parametrize("name", TEXTS)
def test_the_links_of_a_page_lead_somewhere(name):
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[name])
    for link in (link for link in links if not link.startswith("http")):
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text()), link


# --- Figures that follow from the code

LATENCIES = re.findall(
    r"^\| \[.*?\]\((pretrained/\w+)\) \|.*?([\d,]+) ms", TEXTS["README.md"], flags=re.MULTILINE
)


@pytest.mark.parametrize(("name", "milliseconds"), LATENCIES)
def test_the_latency_in_the_readme_is_that_of_a_stream(name, milliseconds):
    (file,) = (ROOT / name).glob("g_*")
    generator, h = load_generator(file)
    latency = 1000 * Streamer(generator).latency * h.hop_size / h.sampling_rate
    assert round(latency) == int(milliseconds.replace(",", ""))


# --- Configs

KEYS = {
    key: default
    for key, default in re.findall(
        r"^\| `(\w+)` \| ([^|]*?) ?\|", TEXTS["docs/configs.md"], flags=re.MULTILINE
    )
}


@pytest.mark.parametrize("field", fields(Config), ids=lambda field: field.name)
def test_a_config_key_is_documented_with_its_default(field):
    written = KEYS[field.name].strip("`")
    assert (json.loads(written) if written else MISSING) == field.default


REFUSALS = re.findall(r"`((\w+) = ([^`]*?): expected [^`]*)`", TEXTS["docs/configs.md"])


@pytest.mark.parametrize(("message", "key", "value"), REFUSALS, ids=[key for _, key, _ in REFUSALS])
def test_a_config_is_refused_in_the_words_of_the_page(tmp_path, message, key, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(toy_values() | {key: json.loads(value)}))
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value) == f"{path}: {message}"


# --- Troubleshooting


class Newcomer:
    """A user with a small corpus and a run of two steps, who makes mistakes."""

    def __init__(self, corpus: Path, folder: Path):
        self.corpus, self.folder = corpus, folder
        self.config = write_config(folder / "config.json")
        assert self.train() == 0

    def train(self, *flags) -> int:
        paths = ("--config", self.config, "--checkpoint_path", self.folder / "cp")
        common = (*corpus_arguments(self.corpus), *paths, "--training_steps", 2)
        return run_main(train, *common, *flags)

    def synthesize(self, checkpoint_file: str, mel: np.ndarray | None = None) -> None:
        (self.folder / "mels").mkdir(exist_ok=True)
        np.save(self.folder / "mels/clip.npy", np.full((80, 20), -5.0) if mel is None else mel)
        paths = ("--checkpoint_file", self.folder / checkpoint_file, "--output_dir", self.folder)
        run_main(inference_e2e, *paths, "--input_mels_dir", self.folder / "mels")

    def config_with(self, **changes) -> Path:
        return write_config(self.folder / "another.json", **changes)

    def list_of(self, text: str) -> tuple:
        (self.folder / "list.txt").write_text(text)
        return "--input_training_file", self.folder / "list.txt"

    def transposed(self):
        self.synthesize("cp/g_00000002", mel=np.zeros((132, 80)))

    def other_settings(self):
        (self.folder / "loud").mkdir()
        config = write_config(self.folder / "loud/config.json", "configs/istft_v2.json")
        generator = Generator(load_config(config))
        generator.conv_post.bias.data[:9] = 5  # log magnitudes, of random phases
        generator.conv_post.bias.data[9:] = torch.arange(9)
        weights = {"generator": to_hifigan_names(generator)}
        save_checkpoint(self.folder / "loud/g_00000001", weights)
        self.synthesize("loud/g_00000001", mel=np.zeros((80, 20)))

    def integers_as_floats(self):
        samples = np.random.default_rng(0).integers(-(2**15), 2**15, 9000).astype(np.float32)
        soundfile.write(self.folder / "a.wav", samples, 22050, subtype="FLOAT")
        self.train(*self.list_of(f"{self.folder}/a\n" * 2), "--training_steps", "3")

    def another_length(self):
        for clip in (self.corpus / "wavs").glob("*.wav"):
            np.save(self.folder / f"{clip.stem}.npy", np.zeros((80, 60)))
        self.train("--fine_tuning", "True", "--input_mels_dir", self.folder)

    def moved(self, config: Path | None = None):
        (self.folder / "moved").mkdir()
        shutil.copy(self.folder / "cp/g_00000002", self.folder / "moved")
        if config is not None:
            shutil.copy(config, self.folder / "moved/config.json")
        self.synthesize("moved/g_00000002")

    def two_runs(self):
        with checkpoint.locked(self.folder / "cp"):
            flags = map(str, (*corpus_arguments(self.corpus), "--config", self.config))
            command = [sys.executable, ROOT / "train.py", *flags]
            command += ["--checkpoint_path", self.folder / "cp"]
            print(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr)

    def no_gpu(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.cuda.device_count", lambda: 0)
            self.train("--device", "cuda")


MISTAKES = {  # by words of the message
    "looks transposed": Newcomer.transposed,
    "values from 0 to 0": Newcomer.other_settings,
    "beyond full scale": Newcomer.other_settings,
    "a peak of": Newcomer.integers_as_floats,
    "(hop_size 256); expected at most 2": Newcomer.another_length,
    "no audio file for the id": lambda self: self.train(*self.list_of("LJ001-0001|words\n")),
    "fewer than batch_size": lambda self: self.train(
        *self.list_of("clip0\nclip1\n"), "--config", self.config_with(batch_size=4)
    ),
    "holds no generator": lambda self: self.synthesize("cp/do_00000002"),
    "no config.json beside it": Newcomer.moved,
    "does not fit the config": lambda self: self.moved(
        self.config_with(upsample_initial_channel=32)
    ),
    "expected the same model, mel and optimizer": lambda self: self.train(
        "--config", self.config_with(fmax=11025)
    ),
    "in use by another run": Newcomer.two_runs,
    "nothing to do": Newcomer.train,
    "a loss was not finite": lambda self: self.train(
        "--config", self.config_with(learning_rate=1e30), "--training_steps", "9"
    ),
    "this machine has 0 CUDA devices": Newcomer.no_gpu,
}
TROUBLES = [
    message
    for message in re.findall(
        r"^\| `([^`]+)` \|", TEXTS["docs/troubleshooting.md"], flags=re.MULTILINE
    )
    if " " in message and not message.startswith("pip ")
]


def test_the_pages_have_what_is_tested():
    assert all((RUN, INLINE, SNIPPETS, LATENCIES, KEYS, REFUSALS))
    assert len(TROUBLES) >= len(MISTAKES)


@pytest.mark.parametrize("message", TROUBLES, ids=lambda message: message[:40])
def test_a_mistake_is_reported_in_the_words_of_the_page(corpus, tmp_path, capsys, message):
    (mistake,) = (mistake for words, mistake in MISTAKES.items() if words in message)
    newcomer = Newcomer(corpus, tmp_path)
    capsys.readouterr()
    try:
        mistake(newcomer)
        printed = "".join(capsys.readouterr())
    except UserError as error:
        printed = f"error: {error}"
    pattern = ".*".join(map(re.escape, message.split("...")))
    whole = message.startswith(("error: ", "skipped: ", "nothing to do"))  # else a part of a line
    match = re.fullmatch if whole else re.search
    assert any(match(pattern, line) for line in printed.splitlines()), printed
