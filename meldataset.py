"""From audio files to what the generator learns from.

    ids -> load_wav -> segment -> LogMelSpectrogram -> (mel [num_mels, T], wav [1, T * hop_size])

As a command, writes the mels of a folder of audio files, as `inference.py` would see them:

    python meldataset.py --config config_v1.json --input_wavs_dir wavs --output_dir ft_dataset
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from audio import AUDIO_EXTENSIONS, Wav, load_mel, load_wav, open_wav, write_npy
from env import Config, UserError, band_edges, load_config
from utils import FileProgress, command_line, command_parser, find_file, plan_outputs

MAX_AMPLITUDE = 0.95  # of each training clip's peak, as in HiFi-GAN
MIN_POWER = 1e-9  # keeps the gradient of the square root finite
MIN_MAGNITUDE = 1e-5
SILENT_LOG_MEL = float(np.log(MIN_MAGNITUDE))

# Acoustic models count frames in their own ways: Tacotron 2 has one more than there are hops.
MAX_FRAMES_ASTRAY = 2


class MelRecipe(NamedTuple):
    """A mel's recipe, in the words of Config."""

    sampling_rate: int
    fmin: float
    n_fft: int
    hop_size: int
    win_size: int
    num_mels: int


def mel_filterbank(h: Config | MelRecipe, fmax: float | None) -> torch.Tensor:
    """Slaney's triangles of equal area, [num_mels, n_fft // 2 + 1], float32.

    librosa's, to rounding; to import that takes a second.
    """
    nyquist = h.sampling_rate / 2
    edges = np.array(band_edges(h.num_mels, h.fmin, nyquist if fmax is None else fmax))
    bins = np.linspace(0, nyquist, h.n_fft // 2 + 1)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle))
    return torch.from_numpy(triangles.clip(min=0) * 2 / (high - low)).float()


class LogMelSpectrogram(nn.Module):
    """wav [B, N] -> log-mel [B, num_mels, N // hop_size], HiFi-GAN's, for every mel of the project.

    Slaney's filterbank up to `fmax` Hz (None: half of the sampling rate), N at least hop_size.
    Frame t is centred on samples t * hop_size to (t + 1) * hop_size.

    Source: jik876/hifi-gan, meldataset.py.
    """

    def __init__(self, h: Config | MelRecipe, fmax: float | None):
        super().__init__()
        self.n_fft, self.hop_size, self.win_size = h.n_fft, h.hop_size, h.win_size
        self.register_buffer("filterbank", mel_filterbank(h, fmax), persistent=False)
        self.register_buffer("window", torch.hann_window(h.win_size), persistent=False)

    def forward(self, wav: torch.Tensor) -> torch.Tensor:
        return _log(self.filterbank @ self._magnitude(wav))

    def of_bins(self, wav: torch.Tensor) -> torch.Tensor:
        """The log magnitudes without the filterbank, [B, n_fft // 2 + 1, N // hop_size]."""
        return _log(self._magnitude(wav))

    def _magnitude(self, wav: torch.Tensor) -> torch.Tensor:
        frames = wav.shape[-1] // self.hop_size
        padding = (self.n_fft - self.hop_size) // 2
        missing = padding + 1 - wav.shape[-1]  # for reflection to have something to reflect
        wav = F.pad(wav, (0, max(0, missing)))
        wav = F.pad(wav.unsqueeze(1), (padding, padding), mode="reflect").squeeze(1)
        spectrum = torch.stft(
            wav,
            self.n_fft,
            hop_length=self.hop_size,
            win_length=self.win_size,
            window=self.window,
            center=False,
            return_complex=True,
        )[..., :frames]
        return torch.sqrt(spectrum.real.square() + spectrum.imag.square() + MIN_POWER)


def _log(magnitude: torch.Tensor) -> torch.Tensor:
    return magnitude.clamp(min=MIN_MAGNITUDE).log()


def mel_of_stretch(
    log_mel: LogMelSpectrogram, wav: torch.Tensor, first: int, stop: int
) -> torch.Tensor:
    """Frames `first` to `stop` of the log-mel of wav [N], as [num_mels, stop - first].

    Equal to that slice of the whole waveform's mel, to rounding; frames that there are not are left
    out, as in any slice.
    """
    hop_size = log_mel.hop_size
    context = -(-log_mel.n_fft // hop_size)  # frames that the end of a slice would bend
    begin, stop = max(0, first - context), min(stop, len(wav) // hop_size)
    stretch = wav[begin * hop_size : (stop + context) * hop_size]
    return log_mel(stretch.unsqueeze(0))[0, :, first - begin : stop - begin]


def read_clips(file_list: str | Path, wavs_dir: str | Path) -> np.ndarray:
    """The audio files, relative to `wavs_dir`, of a list in HiFi-GAN's format: `id|anything`.

    An id may contain folders; its extension is found. The names are bytes, as the system has them,
    in one array: worker processes share it, and a million ids of LJSpeech take 14 MB.

    Raises:
        UserError: unreadable list, or an id without an audio file.
    """
    names = []
    try:
        with open(file_list, encoding="utf-8-sig") as lines:  # Windows writes a byte order mark
            for line in lines:
                if clip_id := line.split("|", 1)[0].strip():
                    name = find_file(wavs_dir, clip_id, AUDIO_EXTENSIONS)
                    if name is None and not os.path.isdir(wavs_dir):
                        raise UserError(
                            f"{wavs_dir}: no such folder; expected the audio files of {file_list}: "
                            "give --input_wavs_dir"
                        )
                    if name is None:
                        raise UserError(
                            f"{file_list}: no audio file for the id {clip_id!r} in {wavs_dir}; is "
                            f"--input_wavs_dir right? Looked for {', '.join(AUDIO_EXTENSIONS)}"
                        )
                    names.append(os.fsencode(name))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file_list}: cannot be read ({error})") from None
    return np.array(names, dtype=bytes)


class MelDataset(torch.utils.data.Dataset):
    """Segments of the clips of a list: `dataset[epoch, index]` is (mel [num_mels, T], wav [1, N]).

    T = segment_size // hop_size and N = segment_size. Which segment it is follows from the config's
    seed, the epoch and the index alone.

    With `mels_dir`, for fine-tuning, the mel is cut out of `<mels_dir>/<id>.npy`, an acoustic
    model's; otherwise it is computed from the segment. Shorter clips are padded with silence.
    """

    def __init__(
        self,
        h: Config,
        file_list: str | Path,
        wavs_dir: str | Path,
        mels_dir: str | Path | None = None,
    ):
        self.h = h
        self.wavs_dir = Path(wavs_dir)
        self.mels_dir = None if mels_dir is None else Path(mels_dir)
        self.clips = read_clips(file_list, wavs_dir)
        self.log_mel = LogMelSpectrogram(h, h.fmax)
        # Of each clip that this process has read whole and found good: from then on a part will do.
        self.known = np.zeros(len(self.clips), dtype=[("samples", "i8"), ("peak", "f4")])
        if self.mels_dir is not None:
            self._check_ids(file_list)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = key
        random = np.random.default_rng((self.h.seed, epoch, index))
        hop_size, size = self.h.hop_size, self.h.segment_size
        wav = self._open_wav(index)
        if self.mels_dir is None:
            start = random.integers(max(0, wav.samples - size) + 1)
            segment = _padded(wav.part(start, min(start + size, wav.samples)), size, 0.0)
            return self.log_mel(segment[None])[0], segment[None]
        mel = self._load_mel(index, frames=wav.samples // hop_size)
        frames = size // hop_size
        last = min(mel.shape[1], wav.samples // hop_size)
        start = random.integers(max(0, last - frames) + 1)
        stop = min(start + frames, last)
        segment = _padded(wav.part(start * hop_size, stop * hop_size), size, 0.0)
        return _padded(mel[:, start:stop], frames, SILENT_LOG_MEL), segment[None]

    def whole(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All of clip `index`: (mel [num_mels, T], wav [1, T * hop_size]).

        Raises:
            UserError: the clip or its mel cannot be used, or their lengths do not belong together.
        """
        wav = self._open_wav(index)
        wav = wav.part(0, wav.samples)
        if self.mels_dir is None:
            mel = self.log_mel(wav[None])[0]
        else:
            mel = self._load_mel(index, frames=len(wav) // self.h.hop_size)
        frames = min(mel.shape[1], len(wav) // self.h.hop_size)
        return mel[:, :frames], wav[None, : frames * self.h.hop_size]

    def path(self, index: int) -> Path:
        """The audio file of clip `index`."""
        return self.wavs_dir / os.fsdecode(self.clips[index])

    def mel_path(self, index: int) -> Path:
        """The acoustic model's mel of clip `index`, with `mels_dir`."""
        name = self._mel_name(index)
        return self.mels_dir / (find_file(self.mels_dir, name, (".npy",)) or f"{name}.npy")

    def _open_wav(self, index: int) -> Wav:
        """Clip `index` at the level at which it is learnt; read whole the first time."""
        recipe = self.path(index), self.h.sampling_rate, self.h.hop_size
        samples, peak = self.known[index]
        wav = open_wav(*recipe) if samples else None
        if wav is None or wav.samples != samples:
            whole = load_wav(*recipe)
            peak = whole.abs().max().numpy()
            self.known[index] = len(whole), peak
            wav = Wav(len(whole), lambda first, stop: whole[first:stop])
        # An acoustic model's mels were taken at the clip's own level.
        if self.mels_dir is not None or peak <= torch.finfo(torch.float32).tiny:
            return wav
        gain = MAX_AMPLITUDE / torch.tensor(peak)
        return Wav(wav.samples, lambda first, stop: wav.part(first, stop) * gain)

    def _load_mel(self, index: int, frames: int) -> torch.Tensor:
        path = self.mel_path(index)
        mel = load_mel(path, self.h.num_mels)
        if abs(mel.shape[1] - frames) > MAX_FRAMES_ASTRAY:
            raise UserError(
                f"{path}: {mel.shape[1]} frames, but {self.path(index)} has {frames} of "
                f"{self.h.hop_size} samples; expected at most {MAX_FRAMES_ASTRAY} more or fewer"
            )
        return mel

    def _mel_name(self, index: int) -> str:
        """The mel of a clip, without its extension: in `mels_dir` as the wav in `wavs_dir`."""
        clip = os.fsdecode(self.clips[index])
        if os.path.isabs(clip) or ".." in clip:
            clip = os.path.relpath(self.path(index), self.wavs_dir)
        return os.path.splitext(clip)[0]

    def _check_ids(self, file_list: str | Path) -> None:
        """Raises UserError for a clip outside of `wavs_dir`: its mel would be outside, too."""
        for index in range(len(self)):
            if self._mel_name(index).startswith("../"):
                raise UserError(
                    f"{file_list}: {self.path(index)} lies outside of {self.wavs_dir}; expected "
                    "ids in it, for a mel is found by its id in --input_mels_dir"
                )


def _padded(x: torch.Tensor, length: int, value: float) -> torch.Tensor:
    """x [..., n] with `value` at its end up to `length`."""
    return F.pad(x, (0, length - x.shape[-1]), value=value)


class ResumableBatchSampler(torch.utils.data.Sampler):
    """Yields the keys (epoch, index) of this process's share of each batch, epoch after epoch.

    The order of an epoch follows from (seed, epoch) alone, whatever the number of processes. A last
    batch that would not be full is dropped, as in HiFi-GAN. `epoch` and `epoch_step`, the batches
    of it already taken, say where to begin.
    """

    def __init__(
        self,
        num_clips: int,
        h: Config,
        epoch: int = 0,
        epoch_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.num_clips, self.batch_size, self.seed = num_clips, h.batch_size, h.seed
        self.epoch, self.epoch_step = epoch, epoch_step
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.batch_size
        first = self.epoch_step * size
        for epoch in itertools.count(self.epoch):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_clips)
            for begin in range(first, self.num_clips - size + 1, size):
                share = order[begin : begin + size][self.rank :: self.world_size]
                yield [(epoch, int(index)) for index in share]
            first = 0


def main() -> int:
    """Writes `<output_dir>/<id>.npy`, [num_mels, T], for each audio file."""
    parser = command_parser(
        "Writes the log-mels of audio files as <id>.npy, float32 [num_mels, T]: to try\n"
        "fine-tuning and inference_e2e.py without an acoustic model, and to compare with one's.",
        example="python meldataset.py --config config_v1.json --input_wavs_dir LJSpeech-1.1/wavs "
        "--output_dir ft_dataset",
    )
    parser.add_argument(
        "--config", metavar="FILE", required=True, help="JSON config that holds the mel's recipe"
    )
    parser.add_argument(
        "--input_wavs_dir",
        metavar="PATH",
        required=True,
        help="audio: a folder, searched in depth, or one file",
    )
    parser.add_argument(
        "--output_dir", metavar="DIR", required=True, help="for the mels; made if needed"
    )
    a = parser.parse_args()
    h = load_config(a.config)
    log_mel = LogMelSpectrogram(h, h.fmax)

    jobs = plan_outputs(a.input_wavs_dir, AUDIO_EXTENSIONS, a.output_dir, ending=".npy")
    with FileProgress(len(jobs), a.output_dir) as tally:
        for source, output in jobs:
            with tally.skipping():
                wav = load_wav(source, h.sampling_rate, min_samples=h.hop_size)
                write_npy(output, log_mel(wav.unsqueeze(0))[0].numpy())
                tally.written()
    return tally.status


if __name__ == "__main__":
    command_line(main)
