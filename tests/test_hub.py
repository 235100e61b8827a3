"""torch.hub in a program that has modules of the same names, as HiFi-GAN's repositories do."""

import ast
import subprocess
import sys

import pytest
import torch

import hubconf
from tools.toy import ROOT

PROGRAM = """
import sys, torch
if "first" in sys.argv:
    import env, models, utils
    assert utils.OWNER == "host"
load = lambda entry: torch.hub.load(sys.argv[1], entry, source="local", name="frame_v3_universal")
mel = load("log_mel")(0.1 * torch.randn(1, 8192))
wav = load("misrnet")(mel)
assert wav.shape == (1, 1, 8192)
streamer = load("streamer")
assert len(streamer.flush(mel[0])) == 8192
import env, models, utils
assert utils.OWNER == env.OWNER == models.OWNER == "host"
assert sys.argv[1] not in sys.path
"""


@pytest.mark.parametrize("order", ["first", "afterwards"])
def test_the_host_program_and_the_hub_keep_their_modules_apart(order, tmp_path):
    for name in ("env", "models", "utils"):
        (tmp_path / f"{name}.py").write_text('OWNER = "host"\n')
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", str(ROOT), order]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_name_without_weights_is_answered_by_the_names_there_are():
    with pytest.raises(ValueError, match="no such weights; there are frame_v2_24k, "):
        hubconf.misrnet("frame_v9")


def test_importing_hubconf_leaves_the_modules_of_this_program_alone():
    import models

    assert sys.modules["models"] is models
    assert not isinstance(hubconf.misrnet("frame_v3_universal"), models.Generator)
    assert isinstance(hubconf.log_mel(), torch.nn.Module)


def test_the_dependencies_are_all_that_the_hub_imports():
    found, waiting = set(), {"hubconf", "checkpoint", "env", "inference", "meldataset"}
    while waiting - found:
        name = (waiting - found).pop()
        found.add(name)
        if (path := ROOT / f"{name}.py").exists():
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.Import):
                    waiting |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    waiting.add(node.module.partition(".")[0])
    ours = {path.stem for path in ROOT.glob("*.py")}
    assert set(hubconf.dependencies) == found - ours - set(sys.stdlib_module_names)
