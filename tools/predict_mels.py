"""Predicts the mels of recordings with a small acoustic model, to try out fine-tuning.

    python tools/predict_mels.py --config configs/frame_v2.json \\
        --input_wavs_dir LJSpeech-1.1/wavs --durations durations.tsv --output_dir ft_dataset

The model stands in for an acoustic model in teacher forcing. Its inputs are phones, their durations
and mean mels (as in AdaSpeech), and F0, all of the recording. A clip is predicted by a model that
was trained on other clips (other folds), because predictions of training data are sharper.

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

FOLDS = 4  # each takes about half a minute on one CPU core
CHANNELS, PHONE_CHANNELS, DILATIONS = 160, 32, (1, 2, 4)
SEGMENT, BATCH_SIZE, LEARNING_RATE = 64, 8, 0.002  # frames, segments; the rate falls to 0


class Clip(NamedTuple):
    """A recording, frame by frame."""

    phones: torch.Tensor  # [3, T], indices of a frame's phone and its neighbours
    inputs: torch.Tensor  # [4 * num_mels + 3, T], of `read_clip`
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
    """Returns the Clip of the recording at `path`, given the indices of its phones.

    The inputs of a frame are the mean mels of its phone and of the neighbours, a comb with peaks at
    the harmonics of F0, periodicity, the position in the phone and its duration. Raises UserError.
    """
    wav = load_wav(path, h.sampling_rate, min_samples=h.hop_size)[None]
    mel = LogMelSpectrogram(h, h.fmax)(wav)[0]
    T, total = mel.shape[1], sum(durations)
    if len(phones) != len(durations) or abs(T - total) > MAX_EXTRA_FRAMES:
        raise UserError(f"{path}: {T} frames, but its durations add up to {total}")
    durations[-1] += T - total
    phones, durations = torch.tensor([x for x in zip(phones, durations, strict=True) if x[1]]).T
    of_frame = torch.arange(len(phones)).repeat_interleave(durations)
    means = torch.stack([x.mean(1) for x in mel.split(durations.tolist(), dim=1)], dim=1)
    around = F.pad(torch.cat([means, phones[None]]), (1, 1), mode="replicate")
    before, here, after = (around[:, of_frame + i] for i in range(3))
    lag, periodicity = (x[:, :T] for x in PitchEstimator(h).lag(F.pad(wav, (0, h.hop_size))))
    lag = F.pad(lag, (4, 4), mode="replicate").unfold(1, 9, 1).median(-1)[0]
    is_voiced = F.avg_pool1d(3 * periodicity, 5, 1, 2, count_include_pad=False).clamp(0, 1)
    bands = torch.from_numpy(band_edges(h, h.fmax)[1:-1]).float()
    comb = (2 * torch.pi * bands[:, None] / h.sampling_rate * lag).cos() * is_voiced
    position = (durations.cumsum(0)[of_frame] - torch.arange(T)) / durations[of_frame]
    others = torch.stack([is_voiced[0], position, durations[of_frame].log() / 4])
    mels = F.avg_pool1d(here[:-1], 7, 1, 3, count_include_pad=False), before[:-1], after[:-1]
    neighbours = torch.stack([x[-1] for x in (before, here, after)]).long()
    return Clip(neighbours, torch.cat([*mels, comb, others]), mel)


class AcousticModel(nn.Module):
    """Predicts mels: phones [B, 3, T], inputs [B, I, T] -> [B, num_mels, T]."""

    def __init__(self, num_phones: int, num_inputs: int, num_mels: int):
        super().__init__()
        self.embedding = nn.Embedding(num_phones, PHONE_CHANNELS)
        self.conv_pre = nn.Conv1d(3 * PHONE_CHANNELS + num_inputs, CHANNELS, 1)
        self.blocks = nn.ModuleList(
            nn.Conv1d(CHANNELS, CHANNELS, 3, padding="same", dilation=d) for d in DILATIONS
        )
        self.conv_post = nn.Conv1d(CHANNELS, num_mels, 1)

    def forward(self, phones: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        embedded = self.embedding(phones).transpose(2, 3).flatten(1, 2)
        x = self.conv_pre(torch.cat([embedded, inputs / 4], dim=1))
        for conv in self.blocks:
            x = x + F.gelu(conv(x))
        return inputs[:, : self.conv_post.out_channels] + self.conv_post(x)


def train(clips: list[Clip], num_phones: int, updates: int) -> AcousticModel:
    """Returns a model that was trained on random segments of `clips` with the L1 loss."""
    torch.manual_seed(0)
    data = [torch.cat(parts, dim=1) for parts in zip(*clips, strict=True)]  # phones, inputs, mel
    model = AcousticModel(num_phones, *map(len, data[1:]))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - update / updates)
        starts = torch.randint(data[2].shape[1] - SEGMENT + 1, (BATCH_SIZE,))
        phones, inputs, mel = (torch.stack([x[:, i : i + SEGMENT] for i in starts]) for x in data)
        model.zero_grad()
        F.l1_loss(model(phones, inputs), mel).backward()
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
    add("--updates", type=positive, default=1500, metavar="N", help="updates of each model")
    a = parser.parse_args()
    h, rows = load_config(a.config), read_durations(a.durations)
    symbols = sorted({phone for _, phones, _ in rows for phone in phones})
    clips, errors = {}, []
    for name, phones, durations in rows:
        path = Path(a.input_wavs_dir, find_file(a.input_wavs_dir, name, AUDIO_EXTENSIONS) or name)
        clips[name] = read_clip(path, h, [symbols.index(p) for p in phones], durations)
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
