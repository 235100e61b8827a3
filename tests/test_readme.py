"""What the README says can be typed."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from env import UserError, load_config
from tests.conftest import ROOT, write_config

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
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
