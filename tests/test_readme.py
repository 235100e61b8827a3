"""What the README and docs/ say: commands, snippets, flags, links and errors, in any order."""

import contextlib
import functools
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unicodedata import category

import numpy as np
import pytest
import soundfile
import torch

import checkpoint
import evaluate
import inference
import inference_e2e
import train
from checkpoint import build_state, save
from env import UserError, load_config
from inference import load_generator
from tools.toy import ROOT, corpus_arguments, run_main, toy_values, write_config

PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}
ALL = "\n".join(TEXTS.values())


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks in one of `languages`; "" is one without a name."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in languages]


# --- Commands

COMMANDS = {
    command: command.split()[1:]
    for block in blocks(ALL, "", "sh", "bash")
    for command in block.replace("\\\n", " ").splitlines()
    if re.match(r"python \S+\.py\b", command)
}
INLINE = {text: text.split()[1:] for text in re.findall(r"`(python \S+\.py\b[^`]*)`", ALL)}
# Those in tools/ measure, for long.
RUN = [command for command, words in COMMANDS.items() if "/" not in words[0]]


def module_of(script: str):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


@functools.cache
def help_of(script: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        run_main(module_of(script), "--help")
    return printed.getvalue()


def has_flag(script: str, flag: str) -> bool:
    return re.search(rf"^  (-\w, )?{flag}\b", help_of(script), flags=re.MULTILINE) is not None


@pytest.mark.parametrize("command", COMMANDS | INLINE)
def test_commands_have_flags_that_exist(command):
    script, *words = (COMMANDS | INLINE)[command]
    for flag in (word for word in words if word.startswith("--")):
        assert has_flag(script, flag), flag


# What is of another program, or is said to be gone.
FOREIGN_FLAGS = {
    "--shm-size",
    "--group_name",
    "--no-deps",
    "--matcha-vocoder",
    "--discriminator_train_start_steps",
}
SCRIPTS = sorted({words[0] for words in (COMMANDS | INLINE).values()})


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[\w-]+)", ALL)) - FOREIGN_FLAGS))
def test_flags_in_the_text_exist(flag):
    assert any(has_flag(script, flag) for script in SCRIPTS)


SHIPPED = sorted(set(re.findall(r"\bpretrained/\w+", ALL)) - {"pretrained/samples"})


@pytest.mark.parametrize("folder", SHIPPED)
def test_the_weights_are_there(folder):
    assert list((ROOT / folder).glob("g_*"))
    load_config(ROOT / folder / "config.json")


@pytest.fixture
def home(corpus, tmp_path, monkeypatch):
    """A folder in which any of the commands can be typed: its files, at toy size."""
    for path in (*ROOT.glob("config_*.json"), *ROOT.glob("configs/*.json")):
        name = str(path.relative_to(ROOT))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_config(tmp_path / name, name)
    for name in ("LJSpeech-1.1", "my_voice"):
        shutil.copytree(corpus, tmp_path / name)
    for name in ("test_files", "generated_files", "test_mel_files", "ft_dataset"):
        (tmp_path / name).mkdir()
    h = load_config(tmp_path / "config_v1.json")
    for path in sorted((corpus / "wavs").glob("*.wav")):
        mel = np.full((80, soundfile.info(path).frames // h.hop_size), -5.0)
        np.save(tmp_path / f"ft_dataset/{path.stem}.npy", mel)
    for name in ("clip5", "clip6"):
        shutil.copy(corpus / f"wavs/{name}.wav", tmp_path / "test_files")
        shutil.copy(corpus / f"wavs/{name}.wav", tmp_path / f"generated_files/{name}_generated.wav")
        shutil.copy(tmp_path / f"ft_dataset/{name}.npy", tmp_path / "test_mel_files")
    trained(tmp_path / "cp_misrnet", tmp_path / "config_v1.json", 500_000)
    trained(tmp_path / "hifigan", tmp_path / "configs/hifigan_v1.json", 2_500_000)
    for folder in SHIPPED:
        config = write_config(tmp_path / "shipped.json", f"{folder}/config.json")
        trained(tmp_path / folder, config, 57_768)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(folder: Path, config: Path, steps: int) -> None:
    """A pair of checkpoints with their config."""
    folder.mkdir(parents=True)
    shutil.copy(config, folder / "config.json")
    state = build_state(load_config(config), torch.device("cpu"))
    state.steps = steps
    save(state, folder, keep=1)


def expanded(words: list[str]) -> list[str]:
    """As a shell does with `*`."""
    return [str(each) for w in words for each in (sorted(Path().glob(w)) if "*" in w else [w])]


OUTPUTS = {  # of a script: files that it must have written
    "train.py": ("g_*1", "do_*1"),
    "distill.py": ("g_*1", "do_*1"),
    "inference.py": ("generated_files/clip[56]_generated.wav",),
    "inference_e2e.py": ("generated_files_from_mel/clip[56]_generated_e2e.wav",),
    "meldataset.py": ("*.npy",),
    "export_onnx.py": ("misrnet.onnx",),
    "evaluate.py": ("results.json",),
}


@pytest.mark.parametrize("command", RUN)
def test_commands_do_what_they_say(home, monkeypatch, command):
    script, *words = COMMANDS[command]
    words = expanded(words)
    if "--help" in words:
        return
    if script in ("train.py", "distill.py"):
        place = words.index("--checkpoint_path") + 1 if "--checkpoint_path" in words else None
        folder = words[place] if place else "cp_misrnet"
        done = max(checkpoint.checkpoint_steps(folder, "g"), default=0)
        words += ["--training_steps", str(done + 1), "--device", "cpu"]
    elif "--output_dir" in words:
        shutil.rmtree(words[words.index("--output_dir") + 1], ignore_errors=True)
    elif script == "inference.py":
        shutil.rmtree("generated_files")
    elif script == "evaluate.py":  # the others take their time
        words += ["--workers", "1"]
        monkeypatch.setattr(evaluate, "METRICS", evaluate.METRICS[:1])
    assert run_main(module_of(script), *words) == 0
    for pattern in OUTPUTS[script]:
        assert list(home.rglob(pattern)), pattern


# --- Python

SNIPPETS = {name: snippets for name, text in TEXTS.items() if (snippets := blocks(text, "python"))}
BEFORE = """
import numpy, torch
mel = torch.from_numpy(numpy.load("mel.npy")).float()
played = []
play = played.append
"""
AFTER = """
if played:
    assert all(torch.as_tensor(piece).isfinite().all() for piece in played)
    assert sum(map(len, played)) % (70 * 256) == 0  # the whole mel, once or more
"""


@pytest.fixture
def folder(tmp_path, exported):
    """Where the files of the snippets are: a checkpoint, its ONNX form, a mel and a wav."""
    shutil.copytree(exported, tmp_path / "cp_misrnet")
    shutil.move(tmp_path / "cp_misrnet/misrnet.onnx", tmp_path)
    mel = np.random.default_rng(0).uniform(-11, 1, (80, 70)).astype(np.float32)
    np.save(tmp_path / "mel.npy", mel)
    soundfile.write(tmp_path / "speech.wav", np.zeros(22050), 22050)
    return tmp_path


def run_python(code: str, folder) -> None:
    """Runs `code` in `folder` with the repository's modules."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code.replace("path/to/misrnet", str(ROOT))]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", SNIPPETS)
def test_the_python_snippets_of_a_page_run_one_after_another(folder, name):
    run_python(BEFORE + "\n".join(SNIPPETS[name]) + AFTER, folder)


def test_the_onnx_snippets_need_no_torch(folder):
    snippets = [s for page in SNIPPETS.values() for s in page if "import onnxruntime" in s]
    (folder / "speech.wav").unlink()
    run_python("import sys; sys.modules['torch'] = None\n" + "\n".join(snippets), folder)
    info = soundfile.info(folder / "speech.wav")
    assert (info.samplerate, info.frames) == (22050, 70 * 256)


# --- Links and targets

LINKS = [
    (name, link)
    for name, text in TEXTS.items()
    for link in re.findall(r"\]\(([^)\s]+)\)", text)
    if not link.startswith("http")
]


def anchors(text: str) -> set[str]:
    """Those of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    kept = (
        "".join(c for c in heading.lower() if category(c)[0] in "LN" or c in " -_")
        for heading in headings
    )
    return {each.replace(" ", "-") for each in kept} | set(re.findall(r'(?:id|name)="(.*?)"', text))


@pytest.mark.parametrize(("name", "link"), LINKS)
def test_links_lead_somewhere(name, link):
    target, _, anchor = link.partition("#")
    path = (ROOT / name).parent / target if target else ROOT / name
    assert path.exists()
    assert not anchor or anchor in anchors(path.read_text())


def test_make_has_the_targets():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"\bmake (\w+)`", ALL) + re.findall(r"^make (\w+)", ALL, re.M)) <= set(
        targets
    )


# --- Errors

REFUSALS = re.findall(r"`((\w+) = ([^`]*?): expected [^`]*)`", ALL)


@pytest.mark.parametrize(("message", "key", "value"), REFUSALS, ids=[key for _, key, _ in REFUSALS])
def test_configs_are_refused_in_the_words_of_the_pages(tmp_path, message, key, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(toy_values() | {key: json.loads(value)}))
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value) == f"{path}: {message}"


def test_the_pages_have_commands_snippets_refusals_and_troubles():
    assert all((RUN, SNIPPETS, LINKS, REFUSALS, TROUBLES))


TROUBLES = [
    message
    for table in re.findall(r"^\| what you see \|.*\n\|[-|]+\n((?:\|.*\n?)+)", ALL, re.MULTILINE)
    for message in re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)
]


class Newcomer:
    """Someone with a small corpus and a run of two steps, to whom things happen."""

    def __init__(self, corpus, folder):
        self.corpus, self.folder = corpus, folder
        self.config = write_config(folder / "config.json")
        assert self.train() == 0

    def train(self, *flags) -> int:
        paths = ("--config", self.config, "--checkpoint_path", self.folder / "cp")
        return run_main(
            train, *corpus_arguments(self.corpus), *paths, "--training_steps", 2, *flags
        )

    def another_config(self, **changes):
        return write_config(self.folder / "another.json", **changes)

    def speak(self, checkpoint, mel=None) -> int:
        (self.folder / "mels").mkdir(exist_ok=True)
        np.save(self.folder / "mels/clip.npy", np.zeros((132, 80)) if mel is None else mel)
        return run_main(
            inference_e2e,
            *("--checkpoint_file", checkpoint, "--input_mels_dir", self.folder / "mels"),
            *("--output_dir", self.folder / "wavs"),
        )

    def transposed(self):
        self.speak(self.folder / "cp/g_00000002")

    def another_recipe(self):
        loud = load_generator(self.folder / "cp/g_00000002")
        with pytest.MonkeyPatch.context() as patch:
            loud[0].conv_post.weight.data.mul_(1e9)
            loud[0].forward = lambda mel, _: (torch.full((1, 1, mel.shape[2] * 256), 1.5), None)
            patch.setattr(inference, "load_generator", lambda *_, **__: loud)
            self.speak(self.folder / "cp/g_00000002", mel=np.zeros((80, 20)))

    def integers_as_floats(self):
        samples = np.random.default_rng(0).integers(-(2**15), 2**15, 9000).astype(np.float32)
        soundfile.write(self.folder / "a.wav", samples, 22050, subtype="FLOAT")
        (self.folder / "list.txt").write_text(f"{self.folder}/a\n" * 2)
        self.train("--input_training_file", self.folder / "list.txt", "--training_steps", "3")

    def another_length(self):
        for clip in (self.corpus / "wavs").glob("*.wav"):
            np.save(self.folder / f"{clip.stem}.npy", np.zeros((80, 60)))
        self.train("--fine_tuning", "True", "--input_mels_dir", self.folder)

    def another_folder(self):
        (self.folder / "list.txt").write_text("LJ001-0001|words\n")
        self.train("--input_training_file", self.folder / "list.txt")

    def few_clips(self):
        (self.folder / "list.txt").write_text("clip0\nclip1\n")
        config = self.another_config(batch_size=4)
        self.train("--config", config, "--input_training_file", self.folder / "list.txt")

    def training_file(self):
        self.speak(self.folder / "cp/do_00000002")

    def moved(self, config=None):
        (self.folder / "moved").mkdir()
        shutil.copy(self.folder / "cp/g_00000002", self.folder / "moved")
        if config is not None:
            shutil.copy(config, self.folder / "moved/config.json")
        self.speak(self.folder / "moved/g_00000002")

    def moved_to_another(self):
        self.moved(self.another_config(upsample_initial_channel=32))

    def another_model(self):
        self.train("--config", self.another_config(fmax=11025))

    def two_trainers(self):
        with checkpoint.locked(self.folder / "cp"):
            flags = [*corpus_arguments(self.corpus), "--checkpoint_path", self.folder / "cp"]
            command = [sys.executable, ROOT / "train.py", *flags, "--config", self.config]
            command = list(map(str, command))
            print(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr)

    def finished(self):
        self.train()

    def not_finite(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "generator_loss", lambda scores: scores[0].sum() * float("nan"))
            self.train("--training_steps", "9")

    def no_gpu(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.cuda.device_count", lambda: 0)
            self.train("--device", "cuda")


# By words of the message.
HAPPENINGS: dict[str, Callable] = {
    "looks transposed": Newcomer.transposed,
    "values from 0 to 0": Newcomer.another_recipe,
    "beyond full scale": Newcomer.another_recipe,
    "a peak of": Newcomer.integers_as_floats,
    "samples; expected at most 2": Newcomer.another_length,
    "no audio file for the id": Newcomer.another_folder,
    "fewer than batch_size": Newcomer.few_clips,
    "holds no generator": Newcomer.training_file,
    "no config.json beside it": Newcomer.moved,
    "does not fit the config": Newcomer.moved_to_another,
    "expected the same model, mel and optimizer": Newcomer.another_model,
    "in use by another run": Newcomer.two_trainers,
    "nothing to do": Newcomer.finished,
    "a loss was not finite": Newcomer.not_finite,
    "this machine has 0 CUDA devices": Newcomer.no_gpu,
}


@pytest.mark.parametrize("message", TROUBLES, ids=lambda message: message[:40])
def test_troubles_are_told_in_the_words_of_the_pages(corpus, tmp_path, capsys, message):
    (happening,) = (happening for words, happening in HAPPENINGS.items() if words in message)
    newcomer = Newcomer(corpus, tmp_path)
    capsys.readouterr()
    try:
        happening(newcomer)
        printed = "".join(capsys.readouterr())
    except UserError as error:
        printed = f"error: {error}"
    pattern = ".*".join(map(re.escape, message.split("...")))
    whole = message.startswith(("error: ", "skipped: ", "nothing to do"))  # else a part of a line
    match = re.fullmatch if whole else re.search
    assert any(match(pattern, line) for line in printed.splitlines()), printed
