"""Predicts the mels of recordings with a small acoustic model, to try out fine-tuning.

    python tools/predict_mels.py --config configs/frame_v2.json \\
        --input_wavs_dir LJSpeech-1.1/wavs --durations durations.tsv --output_dir ft_dataset

The model stands in for an acoustic model of your own. Like the decoder of FastSpeech 2 it computes
a mel from phones, their durations and the F0, here those of the recording (teacher forcing). The
clips are divided into folds. Each clip is predicted by a model that was trained on the other folds,
because a model predicts sharper mels of the clips that it has seen.

The file of durations, from a forced aligner such as MFA, has a header and lines of four columns,
separated by tabs: id, frames (not used), phones, and the frames of each phone.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts
from audio import AUDIO_EXTENSIONS, load_wav, write_npy
from env import Config, UserError, load_config
from meldataset import MAX_EXTRA_FRAMES, LogMelSpectrogram, band_edges
from pitch import PitchEstimator
from utils import FileProgress, command_line, command_parser, find_file, positive, say

CHANNELS, PHONE_CHANNELS, BLOCKS = 192, 32, 5
NEIGHBOURS = 2  # phones on either side of a frame's phone
SEGMENT, BATCH_SIZE = 128, 4  # frames, segments
LEARNING_RATE = 0.002  # falls to 0


class Clip(NamedTuple):
    """A recording, frame by frame."""

    phones: torch.Tensor  # [2 * NEIGHBOURS + 1, T], indices; 0 is outside of the clip
    inputs: torch.Tensor  # [num_mels + 5, T], of `read_clip`
    mel: torch.Tensor  # [num_mels, T]


def read_durations(path: str) -> list[tuple[str, list[str], list[int]]]:
    """Returns the id, the phones and their frames of each line; raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()[1:]
        columns = [line.split("\t") for line in lines]
        return [(name, p.split(), [int(x) for x in d.split()]) for name, _, p, d in columns]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); expected lines of id, frames, phones and "
            "durations, separated by tabs"
        ) from None


def read_clip(path: Path, h: Config, phones: list[int], durations: list[int]) -> Clip:
    """Returns the Clip of the recording at `path`, given its phones as indices from 1.

    The inputs of a frame are a comb with peaks at the harmonics of F0, -log F0 and periodicity, the
    position in the phone, and the duration and the mean level of the phone.

    Raises:
        UserError: the recording cannot be used, or the durations do not add up to its frames.
    """
    wav = load_wav(path, h.sampling_rate, min_samples=h.hop_size)[None]
    mel = LogMelSpectrogram(h, h.fmax)(wav)[0]
    T, total = mel.shape[1], sum(durations)
    if len(phones) != len(durations) or abs(T - total) > MAX_EXTRA_FRAMES:
        raise UserError(f"{path}: {T} frames, but its durations add up to {total}")
    durations = torch.tensor([*durations[:-1], durations[-1] + T - total])
    of_frame = torch.arange(len(phones)).repeat_interleave(durations)
    padded = F.pad(torch.tensor(phones), (NEIGHBOURS, NEIGHBOURS))
    neighbours = torch.stack([padded[of_frame + i] for i in range(2 * NEIGHBOURS + 1)])
    levels = torch.stack([x.mean() for x in mel.mean(0).split(durations.tolist())])
    position = (durations.cumsum(0)[of_frame] - torch.arange(T)) / durations[of_frame]
    lag, periodicity = (x[0, :T] for x in PitchEstimator(h).lag(F.pad(wav, (0, h.hop_size))))
    bands = torch.from_numpy(band_edges(h, h.fmax)[1:-1]).float()
    comb = (2 * torch.pi * bands[:, None] / h.sampling_rate * lag).cos() * periodicity
    of_phone = durations[of_frame].log() / 4, levels[of_frame] / 4
    others = torch.stack([lag.log() - 5, periodicity, position, *of_phone])
    return Clip(neighbours, torch.cat([comb, others]), mel)


class AcousticModel(nn.Module):
    """Predicts mels: phones [B, 2 * NEIGHBOURS + 1, T], inputs [B, I, T] -> [B, num_mels, T]."""

    def __init__(self, num_phones: int, num_inputs: int, num_mels: int):
        super().__init__()
        self.embedding = nn.Embedding(num_phones + 1, PHONE_CHANNELS)
        width = (2 * NEIGHBOURS + 1) * PHONE_CHANNELS + num_inputs
        self.conv_pre = nn.Conv1d(width, CHANNELS, 1)
        self.blocks = nn.ModuleList(
            nn.Conv1d(CHANNELS, CHANNELS, 3, padding="same", dilation=2 ** (i % 3))
            for i in range(BLOCKS)
        )
        self.conv_post = nn.Conv1d(CHANNELS, num_mels, 1)

    def forward(self, phones: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        embedded = self.embedding(phones).transpose(2, 3).flatten(1, 2)
        x = self.conv_pre(torch.cat([embedded, inputs], dim=1))
        for conv in self.blocks:
            x = x + F.gelu(conv(x))
        return self.conv_post(x)


def train(clips: list[Clip], num_phones: int, updates: int) -> AcousticModel:
    """Returns a model that was trained on random segments of `clips` with the L1 loss."""
    random = np.random.default_rng(0)
    model = AcousticModel(num_phones, len(clips[0].inputs), len(clips[0].mel))
    model.conv_post.bias.data = torch.cat([clip.mel for clip in clips], dim=1).mean(1)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
    clips = [clip for clip in clips if clip.mel.shape[1] >= SEGMENT]
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - update / updates)
        segments = []
        for i in random.integers(len(clips), size=BATCH_SIZE):
            start = random.integers(clips[i].mel.shape[1] - SEGMENT + 1)
            segments.append([x[:, start : start + SEGMENT] for x in clips[i]])
        phones, inputs, mel = map(torch.stack, zip(*segments, strict=True))
        loss = F.l1_loss(model(phones, inputs), mel)
        model.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def main() -> int:
    """Writes `<output_dir>/<id>.npy`, [num_mels, T], for each line of the file of durations."""
    parser = command_parser(
        __doc__.split("\n\n")[0],
        example="python tools/predict_mels.py --config configs/frame_v2.json --input_wavs_dir "
        "LJSpeech-1.1/wavs --durations durations.tsv --output_dir ft_dataset",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="JSON config, which defines the mel")
    add("--input_wavs_dir", required=True, metavar="DIR", help="the recordings")
    help_ = "phones of each recording and their frames"
    add("--durations", required=True, metavar="FILE", help=help_)
    add("--output_dir", required=True, metavar="DIR", help="for the mels; made if needed")
    add("--folds", type=positive, default=4, metavar="N", help="models, at least 2")
    add("--updates", type=positive, default=2000, metavar="N", help="updates of each model")
    a = parser.parse_args()
    h, rows = load_config(a.config), read_durations(a.durations)
    symbols = sorted({phone for _, phones, _ in rows for phone in phones})
    clips = {}
    for name, phones, durations in rows:
        path = Path(a.input_wavs_dir, find_file(a.input_wavs_dir, name, AUDIO_EXTENSIONS) or name)
        clips[name] = read_clip(path, h, [1 + symbols.index(p) for p in phones], durations)
    names, errors = list(clips), []
    with FileProgress(len(clips), a.output_dir) as progress:
        for fold in range(a.folds):
            seen = [clips[name] for i, name in enumerate(names) if i % a.folds != fold]
            model = train(seen, len(symbols), a.updates)
            for name in names[fold :: a.folds]:
                phones, inputs, mel = clips[name]
                predicted = model(phones[None], inputs[None])[0]
                errors.append(float((predicted - mel).abs().mean()))
                write_npy(Path(a.output_dir) / f"{name}.npy", predicted.numpy())
                progress.written()
    say(f"mean absolute error {np.mean(errors):.3f}")
    return progress.status


if __name__ == "__main__":
    command_line(main)
