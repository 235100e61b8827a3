"""tools/convert.py."""

import pytest
import torch

from env import UserError
from inference import load_generator
from tests.conftest import new_checkpoint, random_mel
from tools import convert
from tools.toy import run_main


def test_a_converted_generator_gives_the_same_speech_at_half_the_size(tmp_path):
    source, target = new_checkpoint(tmp_path / "one"), tmp_path / "two/g_00000001"
    run_main(convert, "--checkpoint_file", source, "--output_dir", target.parent)
    assert target.stat().st_size < 0.7 * source.stat().st_size
    mel = random_mel(9)[None]
    before, after = (load_generator(path)[0](mel) for path in (source, target))
    torch.testing.assert_close(after, before, atol=0.01, rtol=0)


def test_a_file_is_not_converted_onto_itself(tmp_path):
    path = new_checkpoint(tmp_path)
    before, folder = path.read_bytes(), f"{tmp_path}/../{tmp_path.name}"
    with pytest.raises(UserError, match="name another --output_dir"):
        run_main(convert, "--checkpoint_file", path, "--output_dir", folder)
    assert path.read_bytes() == before


def test_a_folder_keeps_the_config_of_its_generator(tmp_path):
    first = new_checkpoint(tmp_path / "first")
    second = new_checkpoint(tmp_path / "second", resblock_num=2)
    flags = ("--output_dir", tmp_path / "both")
    for _ in range(2):
        run_main(convert, "--checkpoint_file", first, *flags)
    (tmp_path / "both/g_00000001").unlink()
    with pytest.raises(UserError, match=r"both/config\.json: belongs to another generator"):
        run_main(convert, "--checkpoint_file", second, *flags)
    assert [path.name for path in (tmp_path / "both").iterdir()] == ["config.json"]
