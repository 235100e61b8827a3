"""Predicts the mels of recordings with a small acoustic model, to try out fine-tuning.

    python tools/predict_mels.py --config configs/frame_v2.json \\
        --input_wavs_dir LJSpeech-1.1/wavs --durations durations.tsv --output_dir ft_dataset

The model stands in for FastSpeech 2. It gets phones, their durations and levels, and F0, all of the
recording (teacher forcing). A clip is predicted by a model that was trained on other clips (other
folds), because predictions of its training data would be too sharp.

The file of durations, from a forced aligner such as MFA, has a header and lines of four columns,
separated by tabs: id, frames (not used), phones, and the frames of each phone.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts
from audio import AUDIO_EXTENSIONS, load_wav, write_npy
from env import Config, UserError, load_config
from meldataset import MAX_EXTRA_FRAMES, LogMelSpectrogram, band_edges
from pitch import PitchEstimator
from utils import FileProgress, command_line, command_parser, find_file, positive, say

CHANNELS, PHONE_CHANNELS, DILATIONS = 192, 32, (1, 2, 4, 1, 2)
FOLDS = 4  # each takes about a minute on one CPU core
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
        expected = "lines of id, frames, phones and durations, separated by tabs"
        raise UserError(f"{path}: cannot be read ({error}); expected {expected}") from None


def read_clip(path: Path, h: Config, phones: list[int], durations: list[int]) -> Clip:
    """Returns the Clip of the recording at `path`, given its phones as indices from 1.

    The inputs of a frame are a comb with peaks at the harmonics of F0, the log period,
    periodicity, the position in the phone, and its duration and mean level. Raises UserError.
    """
    wav = load_wav(path, h.sampling_rate, min_samples=h.hop_size)[None]
    mel = LogMelSpectrogram(h, h.fmax)(wav)[0]
    T, total = mel.shape[1], sum(durations)
    if len(phones) != len(durations) or abs(T - total) > MAX_EXTRA_FRAMES:
        raise UserError(f"{path}: {T} frames, but its durations add up to {total}")
    durations = torch.tensor([*durations[:-1], durations[-1] + T - total])
    of_frame = torch.arange(len(phones)).repeat_interleave(durations)
    padded = F.pad(torch.tensor(phones), (NEIGHBOURS, NEIGHBOURS))
    neighbours = padded.unfold(0, 2 * NEIGHBOURS + 1, 1)[of_frame].T
    levels = torch.stack([x.mean() for x in mel.mean(0).split(durations.tolist())])
    position = (durations.cumsum(0)[of_frame] - torch.arange(T)) / durations[of_frame]
    lag, periodicity = (x[0, :T] for x in PitchEstimator(h).lag(F.pad(wav, (0, h.hop_size))))
    bands = torch.from_numpy(band_edges(h, h.fmax)[1:-1]).float()
    comb = (2 * torch.pi * bands[:, None] / h.sampling_rate * lag).cos() * periodicity
    of_phone = (durations.log() / 4)[of_frame], (levels / 4)[of_frame]
    inputs = torch.cat([comb, torch.stack([lag.log() - 5, periodicity, position, *of_phone])])
    return Clip(neighbours, inputs, mel)


class AcousticModel(nn.Module):
    """Predicts mels: phones [B, 2 * NEIGHBOURS + 1, T], inputs [B, I, T] -> [B, num_mels, T]."""

    def __init__(self, num_phones: int, num_inputs: int, num_mels: int):
        super().__init__()
        self.embedding = nn.Embedding(num_phones + 1, PHONE_CHANNELS)
        width = (2 * NEIGHBOURS + 1) * PHONE_CHANNELS + num_inputs
        self.conv_pre = nn.Conv1d(width, CHANNELS, 1)
        self.blocks = nn.ModuleList(
            nn.Conv1d(CHANNELS, CHANNELS, 3, padding="same", dilation=d) for d in DILATIONS
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
    torch.manual_seed(0)
    data = [torch.cat(parts, dim=1) for parts in zip(*clips, strict=True)]  # phones, inputs, mel
    model = AcousticModel(num_phones, *map(len, data[1:]))
    model.conv_post.bias.data = data[2].mean(1)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - update / updates)
        starts = torch.randint(data[2].shape[1] - SEGMENT + 1, (BATCH_SIZE,))
        phones, inputs, mel = (torch.stack([x[:, i : i + SEGMENT] for i in starts]) for x in data)
        loss = F.l1_loss(model(phones, inputs), mel)
        model.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


def main() -> int:
    """Writes `<output_dir>/<id>.npy`, [num_mels, T], for each line of the file of durations."""
    purpose, command, *_ = __doc__.replace("\\", "").split("\n\n")
    parser = command_parser(purpose, example=" ".join(command.split()))
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="JSON config, which defines the mel")
    add("--input_wavs_dir", required=True, metavar="DIR", help="the recordings")
    add("--durations", required=True, metavar="FILE", help="phones of each clip and their frames")
    add("--output_dir", required=True, metavar="DIR", help="for the mels; made if needed")
    add("--updates", type=positive, default=2000, metavar="N", help="updates of each model")
    a = parser.parse_args()
    h, rows = load_config(a.config), read_durations(a.durations)
    symbols = sorted({phone for _, phones, _ in rows for phone in phones})
    clips, errors = {}, []
    for name, phones, durations in rows:
        path = Path(a.input_wavs_dir, find_file(a.input_wavs_dir, name, AUDIO_EXTENSIONS) or name)
        clips[name] = read_clip(path, h, [1 + symbols.index(p) for p in phones], durations)
    with FileProgress(len(clips), a.output_dir) as progress:
        for fold in range(FOLDS):
            others = [clip for i, clip in enumerate(clips.values()) if i % FOLDS != fold]
            model = train(others, len(symbols), a.updates)
            for name in list(clips)[fold::FOLDS]:
                *given, mel = clips[name]
                predicted = model(*(x[None] for x in given))[0]
                errors.append(float((predicted - mel).abs().mean()))
                write_npy(Path(a.output_dir) / f"{name}.npy", predicted.numpy())
                progress.written()
    say(f"mean absolute error {sum(errors) / len(errors):.3f}")
    return progress.status


if __name__ == "__main__":
    command_line(main)
