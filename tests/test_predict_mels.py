"""tools/predict_mels.py at toy size."""

from pathlib import Path

import numpy as np
import pytest

import train
from env import UserError, load_config
from meldataset import MelDataset
from tools import predict_mels
from tools.toy import corpus_arguments, run_main, write_config

HEADER = "id\tframes\tphones\tdurations"


@pytest.fixture
def call(corpus, tmp_path, monkeypatch):
    """A function that predicts the mels of the corpus with a small model; returns their folder.

    The phones are those of loud and of quiet frames.
    """
    monkeypatch.setattr(predict_mels, "SEGMENT", 16)
    monkeypatch.setattr(predict_mels, "CHANNELS", 32)
    monkeypatch.setattr(predict_mels, "FOLDS", 2)
    config = write_config(tmp_path / "config.json")
    clips = MelDataset(load_config(config), corpus / "training.txt", corpus / "wavs")
    rows = []
    for index in range(len(clips)):
        level = clips.whole(index)[0].mean(0).numpy()
        is_loud = level > level.mean()
        starts = [0, *(np.flatnonzero(np.diff(is_loud)) + 1), len(is_loud)]
        phones = ["AA1" if is_loud[start] else "sil" for start in starts[:-1]]
        rows.append([clips.path(index).stem, phones, np.diff(starts)])

    def call(*flags, rows=rows) -> Path:
        lines = ["\t".join((n, "0", " ".join(p), " ".join(map(str, d)))) for n, p, d in rows]
        (tmp_path / "durations.tsv").write_text("\n".join([HEADER, *lines]))
        paths = {
            "--config": config,
            "--input_wavs_dir": corpus / "wavs",
            "--durations": tmp_path / "durations.tsv",
            "--output_dir": tmp_path / "mels",
        }
        words = [word for pair in paths.items() for word in pair]
        assert run_main(predict_mels, *words, *flags) == 0
        return tmp_path / "mels"

    call.rows, call.config = rows, config
    return call


def test_the_mels_follow_the_recordings_and_train_py_takes_them(call, corpus, tmp_path):
    folder = call("--updates", 100)
    names = [name for name, _, _ in call.rows]
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{n}.npy" for n in names)
    clips = MelDataset(load_config(call.config), corpus / "training.txt", corpus / "wavs", folder)
    for predicted, wav in map(clips.whole, range(len(clips))):
        levels = [x.mean(0).numpy() for x in (predicted, clips.log_mel(wav)[0])]
        assert np.corrcoef(*levels)[0, 1] > 0.9
    (tmp_path / "none.txt").write_text("")
    flags = ("--config", call.config, "--checkpoint_path", tmp_path / "cp", "--fine_tuning", "True")
    flags += ("--input_mels_dir", folder, "--input_validation_file", tmp_path / "none.txt")
    assert run_main(train, *corpus_arguments(corpus), *flags, "--training_steps", 1) == 0
    assert (tmp_path / "cp/g_00000001").exists()


def test_a_clip_is_predicted_by_a_model_that_has_not_seen_it(call, monkeypatch):
    frames, seen = [int(sum(d)) for _, _, d in call.rows], []
    assert len(set(frames)) == len(frames) == 5

    def spy(clips, *arguments):
        seen.append([frames.index(clip.mel.shape[1]) for clip in clips])
        return train_model(clips, *arguments)

    train_model = predict_mels.train
    monkeypatch.setattr(predict_mels, "train", spy)
    call("--updates", 1)
    assert seen == [[1, 3], [0, 2, 4]]


def test_durations_that_do_not_fit_are_refused_by_name(call):
    name, phones, durations = call.rows[0]
    with pytest.raises(UserError, match=rf"{name}.wav: \d+ frames, but its durations add up to"):
        call(rows=[(name, phones, [*durations[:-1], durations[-1] + 3])])


def test_a_table_of_other_columns_is_refused(call, tmp_path):
    with pytest.raises(UserError, match=r"durations.tsv: cannot be read .* expected lines of id"):
        call(rows=[("clip0", ["AA1"], ["three"])])
