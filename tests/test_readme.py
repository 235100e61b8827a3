"""What the README says can be typed."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import checkpoint
import inference_e2e
import train
from checkpoint import build_state, save
from env import UserError, load_config
from tools.toy import ROOT, corpus_arguments, run_main, write_config

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
SNIPPETS = [block for language, block in BLOCKS if language == "python"]
REFUSALS = re.findall(r"^\| .* \| `((\w+) = (.*?): expected .*)` \|$", README, flags=re.MULTILINE)


@pytest.fixture
def folder(tmp_path, exported):
    """Where the README's files are: a checkpoint, its ONNX form and a mel."""
    shutil.copytree(exported, tmp_path / "cp_misrnet")
    shutil.move(tmp_path / "cp_misrnet/misrnet.onnx", tmp_path)
    np.save(tmp_path / "mel.npy", np.random.default_rng(0).uniform(-11, 1, (80, 70)))
    return tmp_path


def run_python(code: str, folder) -> str:
    """Runs `code` in `folder` with the repository's modules."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_python_snippets_speak(folder):
    (synthesize,) = (snippet for snippet in SNIPPETS if "wav = synthesize(" in snippet)
    (stream,) = (snippet for snippet in SNIPPETS if "in stream(" in snippet)
    before = (
        "import numpy, torch; mel = torch.from_numpy(numpy.load('mel.npy')).float()\n"
        "pieces = []; play = pieces.append\n"
    )
    after = (
        "print(wav.shape, [len(p) for p in pieces], (torch.cat(pieces) - wav).abs().max() < 1e-5)"
    )
    printed = run_python(before + synthesize + stream + after, folder)
    assert printed == "torch.Size([17920]) [8192, 8192, 1536] tensor(True)\n"


def test_the_onnx_snippet_speaks_without_torch(folder):
    (snippet,) = (snippet for snippet in SNIPPETS if "onnxruntime" in snippet)
    run_python("import sys; sys.modules['torch'] = None\n" + snippet, folder)
    info = soundfile.info(folder / "speech.wav")
    assert (info.samplerate, info.frames) == (22050, 70 * 256)


@pytest.mark.parametrize(("message", "key", "value"), REFUSALS, ids=[key for _, key, _ in REFUSALS])
def test_configs_are_refused_in_the_words_of_the_readme(tmp_path, message, key, value):
    path = write_config(tmp_path / "config.json")
    text = path.read_text()
    changed = re.sub(rf'"{key}": (\[.*?\]|[^,}}]*)', f'"{key}": {value}', text)
    assert changed != text
    path.write_text(changed)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value) == f"{path}: {message}"


def test_the_readme_has_refusals():
    assert len(REFUSALS) == 6


COMMANDS = [
    command.split()
    for language, block in BLOCKS
    for command in block.replace("\\\n", " ").splitlines()
    if not language and command.startswith("python ") and not command.startswith("python -m ")
]
INLINE = [command.split() for command in re.findall(r"`(python [\w/]+\.py --[^`]+)`", README)]


@pytest.fixture
def home(corpus, tmp_path, monkeypatch):
    """A folder in which the README's commands can be typed: its files, at toy size."""
    for name in ("config_v1.json", "config_v2.json"):
        write_config(tmp_path / name)
    for name in ("LJSpeech-1.1", "my_voice"):
        shutil.copytree(corpus, tmp_path / name)
    (tmp_path / "test_files").mkdir()
    for name in ("clip5.wav", "clip6.wav"):
        shutil.copy(corpus / "wavs" / name, tmp_path / "test_files")
    (tmp_path / "test_mel_files").mkdir()
    np.save(tmp_path / "test_mel_files/mel.npy", np.full((80, 70), -5.0))
    state_500000 = build_state(load_config(tmp_path / "config_v1.json"), torch.device("cpu"))
    state_500000.steps = 500_000
    (tmp_path / "cp_misrnet").mkdir()
    shutil.copy(tmp_path / "config_v1.json", tmp_path / "cp_misrnet/config.json")
    save(state_500000, tmp_path / "cp_misrnet", keep=1)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_do_what_they_say(home):
    """All of those in blocks, in the README's order, but mels first: training needs them."""
    assert len(COMMANDS) == 11
    for _, script, *flags in sorted(COMMANDS, key=lambda words: words[1] != "meldataset.py"):
        if script == "train.py":
            steps = 1 if "cp_my_voice" in flags else 500_001
            flags = [*flags, "--training_steps", steps, "--device", "cpu"]
        assert run_main(importlib.import_module(Path(script).stem), *flags) == 0
        if "cp_my_voice" in flags:
            shutil.move("cp_my_voice", f"cp_my_voice{len(list(home.iterdir()))}")
    names = {path.name for path in home.rglob("*")}
    expected = {"g_00500001", "g_00000001", "clip6_generated.wav", "mel_generated_e2e.wav"}
    assert names >= expected | {"misrnet.onnx", "results.json"}
    warm = sorted(home.glob("cp_my_voice*"))
    assert [sorted(path.name for path in each.glob("?_*")) for each in warm] == [["g_00000001"]] * 2


@pytest.mark.parametrize("command", INLINE, ids=" ".join)
def test_the_commands_in_the_text_have_flags_that_exist(command, capsys):
    _, script, *words = command
    with pytest.raises(SystemExit):
        run_main(importlib.import_module(Path(script).stem), "--help")
    help_text = capsys.readouterr().out
    for flag in (word for word in words if word.startswith("--")):
        assert re.search(rf"^  {flag}\b", help_text, flags=re.MULTILINE), flag


TROUBLES = re.findall(
    r"^\| `((?:error|skipped|nothing).*?)` \|",
    README[README.index("## Troubleshooting") :],
    flags=re.MULTILINE,
)


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

    def speak(self, checkpoint) -> int:
        (self.folder / "mels").mkdir(exist_ok=True)
        np.save(self.folder / "mels/clip.npy", np.zeros((132, 80)))
        return run_main(
            inference_e2e,
            *("--checkpoint_file", checkpoint, "--input_mels_dir", self.folder / "mels"),
            *("--output_dir", self.folder / "wavs"),
        )

    def transposed(self):
        self.speak(self.folder / "cp/g_00000002")

    def another_length(self):
        for clip in (self.corpus / "wavs").iterdir():
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
            code = (
                "import sys, train; sys.argv[0] = 'train.py'\n"
                "from utils import command_line; command_line(train.main)"
            )
            flags = [*corpus_arguments(self.corpus), "--checkpoint_path", self.folder / "cp"]
            command = [sys.executable, "-c", code, *map(str, flags), "--config", str(self.config)]
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


HAPPENINGS = (
    *(Newcomer.transposed, Newcomer.another_length, Newcomer.another_folder, Newcomer.few_clips),
    *(Newcomer.training_file, Newcomer.moved, Newcomer.moved_to_another, Newcomer.another_model),
    *(Newcomer.two_trainers, Newcomer.finished, Newcomer.not_finite, Newcomer.no_gpu),
)


@pytest.mark.parametrize(
    ("message", "happening"),
    list(zip(TROUBLES, HAPPENINGS, strict=True)),
    ids=lambda x: str(x)[:40],
)
def test_troubles_are_told_in_the_words_of_the_readme(corpus, tmp_path, capsys, message, happening):
    newcomer = Newcomer(corpus, tmp_path)
    capsys.readouterr()
    try:
        happening(newcomer)
        printed = "".join(capsys.readouterr())
    except UserError as error:
        printed = f"error: {error}"
    pattern = ".*".join(map(re.escape, message.split("...")))
    assert any(re.fullmatch(pattern, line) for line in printed.splitlines()), printed
