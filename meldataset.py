"""From audio files to training pairs, and the log-mel spectrogram of the project.

    ids -> load_wav -> segment -> LogMelSpectrogram -> (mel [num_mels, T], wav [1, T * hop_size])

As a command, writes the mels of audio files, computed as inference.py and training compute them:

    python meldataset.py --config config_v1.json --input_wavs_dir wavs --output_dir ft_dataset
"""

import contextlib
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from audio import (
    AUDIO_EXTENSIONS,
    SilenceError,
    Wav,
    load_mel,
    load_wav,
    open_wav,
    say_mel_warnings,
    write_npy,
)
from env import Config, UsageError, UserError, load_config, one_line
from utils import FileProgress, command_line, command_parser, find_file, plan_outputs, say

MAX_AMPLITUDE = 0.95  # the peak of each training clip, as in HiFi-GAN
# Frames by which a fine-tuning mel may be longer or shorter than its clip. Tacotron 2's mels have
# one more frame than the clip has hops.
MAX_EXTRA_FRAMES = 2
PAIRS_TO_CHECK = 8
# Mean difference of log-mels. Measured on 200 clips: at most 0.65 for mels blurred over 5 frames
# and 5 bands, 1.13 for mels 2 frames late; at least 1.40 for another clip's, 2.49 for log10 mels.
MAX_PAIR_DIFFERENCE = 1.2
# Ranges of the standard deviation of `blurred`. Blurred mels of recordings then vary over time and
# frequency about as much as five mels of Tacotron 2 and FastSpeech 2 do: see docs/fine_tuning.md.
FRAME_BLUR, BAND_BLUR = (0.4, 1.1), (0.5, 1.0)

# ---------------------------------------------------------------------------------------- the mel

# Of HiFi-GAN's mel
MIN_MAGNITUDE = 1e-5
SILENT_LOG_MEL = math.log(MIN_MAGNITUDE)


class MelRecipe(NamedTuple):
    """The parameters of a mel, under Config's names. The defaults are HiFi-GAN's recipe."""

    sampling_rate: int
    fmin: float
    n_fft: int
    hop_size: int
    win_size: int
    num_mels: int
    mel_scale: str = "slaney"
    mel_norm: str | None = "slaney"
    mel_power: float = 1.0
    mel_log_base: float | None = None
    mel_floor: float = MIN_MAGNITUDE
    stft_epsilon: float = 1e-9
    mel_center: bool = False


MEL_KEYS = (*MelRecipe._fields, "fmax")  # the keys of a config that define its mel


def hifigan_recipe(h: Config) -> MelRecipe:
    """Returns HiFi-GAN's recipe at the sizes of a config, for losses, metrics and plots.

    So their weights, values and scales do not depend on the recipe of the generator's mel.
    """
    return MelRecipe(h.sampling_rate, h.fmin, h.n_fft, h.hop_size, h.win_size, h.num_mels)


def slaney_to_hz(mels: np.ndarray) -> np.ndarray:
    """Returns frequencies in Hz: linear up to 15 mels, 1 kHz, then 27 mels for a factor of 6.4."""
    return np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * math.log(6.4) / 27))


def hz_to_slaney(hz: float) -> float:
    """Returns the inverse of `slaney_to_hz`."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def htk_to_hz(mels: np.ndarray) -> np.ndarray:
    """Returns frequencies in Hz; source: the HTK Book, section 5.6."""
    return 700 * (10 ** (mels / 2595) - 1)


def hz_to_htk(hz: float) -> float:
    """Returns the inverse of `htk_to_hz`."""
    return 2595 * math.log10(1 + hz / 700)


MEL_SCALES = {"slaney": (hz_to_slaney, slaney_to_hz), "htk": (hz_to_htk, htk_to_hz)}


def band_edges(h: Config | MelRecipe, fmax: float | None) -> np.ndarray:
    """Returns the frequencies [num_mels + 2] in Hz at which mel bands start, peak and end.

    Band i starts at element i, peaks at i + 1 and ends at i + 2. The bands are equally spaced on
    the recipe's mel scale. `fmax` None is half of the sampling rate.
    """
    to_mel, to_hz = MEL_SCALES[h.mel_scale]
    fmax = h.sampling_rate / 2 if fmax is None else fmax
    return to_hz(np.linspace(to_mel(h.fmin), to_mel(fmax), h.num_mels + 2))


def mel_filterbank(h: Config | MelRecipe, fmax: float | None) -> torch.Tensor:
    """Returns the mel filterbank [num_mels, n_fft // 2 + 1], float32, up to `fmax` Hz.

    The bands are triangles of equal area (`mel_norm` "slaney") or height (None). Equals
    librosa.filters.mel, whose import takes a second.

    Raises:
        UsageError: a band lies between two bins of the STFT, so that it would always be silent.
    """
    nyquist = h.sampling_rate / 2
    edges = band_edges(h, fmax)
    bins = np.linspace(0, nyquist, h.n_fft // 2 + 1)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle))
    empty = int((triangles.max(axis=1) <= 0).sum())
    if empty:
        raise UsageError(
            f"num_mels = {h.num_mels}: {empty} bands from {edges[0]:g} to {edges[-1]:g} Hz contain "
            f"no bin of the STFT; expected fewer bands, or n_fft above {h.n_fft}"
        )
    height = 1.0 if h.mel_norm is None else 2 / (high - low)
    return torch.from_numpy(triangles.clip(min=0) * height).float()


class LogMelSpectrogram(nn.Module):
    """Computes the log-mel spectrogram of a recipe: wav [B, N] -> [B, num_mels, frames(N)].

    Every mel of the project is computed here: STFT magnitudes or powers, mel bands up to `fmax` Hz
    (None: half of the sampling rate), a floor, a logarithm. Frame t is centred on samples
    t * hop_size to (t + 1) * hop_size, or with `mel_center` on sample t * hop_size, as by
    torch.stft. The waveform is reflected at both ends. N is at least hop_size.

    Raises:
        UsageError: as `mel_filterbank`.

    Source: jik876/hifi-gan, meldataset.py.
    """

    def __init__(self, h: Config | MelRecipe, fmax: float | None):
        super().__init__()
        self.h, self.fmax = h, fmax
        self.n_fft, self.hop_size, self.win_size = h.n_fft, h.hop_size, h.win_size
        self.register_buffer("filterbank", mel_filterbank(h, fmax), persistent=False)
        self.register_buffer("window", torch.hann_window(h.win_size), persistent=False)

    def forward(self, wav: torch.Tensor) -> torch.Tensor:
        power = self._power(wav)
        return self.compress(self.filterbank @ (power.sqrt() if self.h.mel_power == 1 else power))

    def frames(self, samples: int) -> int:
        """Returns the number of frames of a waveform: N // hop_size, one more if centred."""
        return samples // self.hop_size + self.h.mel_center

    def of_bins(self, wav: torch.Tensor) -> torch.Tensor:
        """Returns log magnitudes without the filterbank: [B, N] -> [B, n_fft // 2 + 1, T]."""
        return self.compress(self._power(wav).sqrt())

    def compress(self, x: torch.Tensor) -> torch.Tensor:
        """Returns magnitudes or powers on the mel's scale: a logarithm, with a floor."""
        x = x.clamp(min=self.h.mel_floor)
        return x.log() if self.h.mel_log_base is None else x.log10()

    def to_hifigan(self, mel: torch.Tensor) -> torch.Tensor:
        """Returns about the values [num_mels, T] that a mel would have by HiFi-GAN's recipe.

        They are exact where the magnitudes in a band are equal.
        """
        levels = mel * self.h.log_amplitude_scale - self._hifigan_offset().to(mel)[:, None]
        return levels.clamp(min=SILENT_LOG_MEL)

    def from_hifigan(self, level: float) -> float:
        """Returns about the value that a level by HiFi-GAN's recipe has in the lowest band."""
        return (level + float(self._hifigan_offset()[0])) / self.h.log_amplitude_scale

    def _hifigan_offset(self) -> torch.Tensor:
        """Returns by how much to_hifigan lowers each band, [num_mels]."""
        edges = torch.from_numpy(band_edges(self.h, self.fmax))
        area = (edges[2:] - edges[:-2]) / 2  # in Hz, of a triangle of height 1
        if self.h.mel_norm == "slaney":
            area = torch.ones_like(area)
        bins_per_hz = self.h.n_fft / self.h.sampling_rate
        return (area * bins_per_hz).log() / self.h.mel_power - math.log(bins_per_hz)

    def _power(self, wav: torch.Tensor) -> torch.Tensor:
        """wav [B, N] -> squared STFT magnitudes [B, n_fft // 2 + 1, T]."""
        T, is_centred = self.frames(wav.shape[-1]), self.h.mel_center
        left = self.n_fft // 2 if is_centred else (self.n_fft - self.hop_size) // 2
        right = self.n_fft - left if is_centred else left
        missing = right + 1 - wav.shape[-1]  # reflection needs more samples than it adds
        wav = F.pad(wav, (0, max(0, missing)))
        wav = F.pad(wav.unsqueeze(1), (left, right), mode="reflect").squeeze(1)
        spectrum = torch.stft(
            wav,
            self.n_fft,
            hop_length=self.hop_size,
            win_length=self.win_size,
            window=self.window,
            center=False,
            return_complex=True,
        )[..., :T]
        return spectrum.real.square() + spectrum.imag.square() + self.h.stft_epsilon


def mel_of_stretch(
    log_mel: LogMelSpectrogram, wav: torch.Tensor, first: int, stop: int
) -> torch.Tensor:
    """Returns frames `first` to `stop` of the log-mel of wav [N], as [num_mels, stop - first].

    Equals that slice of the whole mel to rounding. Frames beyond the end are left out, as in any
    slice.
    """
    hop_size = log_mel.hop_size
    context = -(-log_mel.n_fft // hop_size)  # frames that depend on samples beyond a slice
    begin, stop = max(0, first - context), min(stop, log_mel.frames(len(wav)))
    stretch = wav[begin * hop_size : (stop + context) * hop_size]
    return log_mel(stretch.unsqueeze(0))[0, :, first - begin : stop - begin]


# ------------------------------------------------------------------------------- the training data


def read_clips(file_list: str | Path, wavs_dir: str | Path) -> np.ndarray:
    """Reads a list in HiFi-GAN's format, lines of `id|text`, and finds the audio files.

    An id is a path in `wavs_dir` with or without extension. Returns the files' paths in `wavs_dir`
    as one array of bytes, which worker processes share; a million ids of LJSpeech take 14 MB.

    Raises:
        UserError: the list cannot be read, or an id has no audio file.
    """
    names = []
    try:
        with open(file_list, encoding="utf-8-sig") as lines:  # Windows writes a byte order mark
            for number, line in enumerate(lines, start=1):
                if clip_id := line.split("|", 1)[0].strip():
                    name = find_file(wavs_dir, clip_id, AUDIO_EXTENSIONS)
                    if name is None:
                        raise _missing_clip(file_list, number, clip_id, wavs_dir)
                    names.append(os.fsencode(name))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file_list}: cannot be read ({error}); expected lines of id|text in UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{file_list}: cannot be read ({error.strerror})") from None
    return np.array(names, dtype=bytes)


def _missing_clip(
    file_list: str | Path, number: int, clip_id: str, wavs_dir: str | Path
) -> UserError:
    """Returns the error for the id of line `number`, which has no audio file in `wavs_dir`."""
    if not os.path.isdir(wavs_dir):
        return UserError(
            f"{wavs_dir}: no such folder; expected the audio files of {file_list}: give "
            "--input_wavs_dir"
        )
    if any(separator in clip_id for separator in '\t,; {"\0'):
        return UserError(
            f"{file_list}: line {number}: no audio file for the id {clip_id[:80]!r} in {wavs_dir}; "
            "expected lines of id|text in UTF-8"
        )
    return UserError(
        f"{file_list}: line {number}: no audio file for the id {clip_id!r} in {wavs_dir}; is "
        f"--input_wavs_dir right? Looked for {', '.join(AUDIO_EXTENSIONS)}"
    )


class MelDataset(torch.utils.data.Dataset):
    """The segments of a list of clips: `dataset[epoch, index]` is (mel [num_mels, T], wav [1, N]).

    N = segment_size and T = N // hop_size. The segment follows from the config's seed, the epoch
    and the index alone. Short clips are padded with silence. A silent clip is skipped, and a line
    is printed; the next clip takes its place.

    For fine-tuning, with `mels_dir`, the mel is cut from `<mels_dir>/<id>.npy`, the output of an
    acoustic model. Otherwise it is computed from the segment, and the clip is normalised to a peak
    of 0.95. With `mel_center`, the segment starts half a hop before the centre of its first frame,
    as the generator's output does.
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
        # Clips that this process has read whole and checked; later reads take only a part.
        self.known = np.zeros(len(self.clips), dtype=[("samples", "i8"), ("peak", "f4")])
        self.silent: set[int] = set()
        if self.mels_dir is not None:
            self._check_ids(file_list)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = key
        random = np.random.default_rng((self.h.seed, epoch, index))
        hop_size, size = self.h.hop_size, self.h.segment_size
        index, wav = self._next_audible(index)
        if self.mels_dir is None:
            start = random.integers(max(0, wav.samples - size) + 1)
            segment = _padded(wav.part(start, min(start + size, wav.samples)), size, 0.0)
            mel = self.log_mel(segment[None, self.h.lead :])[0]
            if random.random() < self.h.mel_blur:
                mel = blurred(mel, random)
            return mel, segment[None]
        mel = self._load_mel(index, frames=wav.samples // hop_size)
        frames = size // hop_size
        last = min(mel.shape[1], wav.samples // hop_size)
        start = random.integers(max(0, last - frames) + 1)
        stop = min(start + frames, last)
        segment = _padded(wav.part(start * hop_size, stop * hop_size), size, 0.0)
        return _padded(mel[:, start:stop], frames, self.h.silent_log_mel), segment[None]

    def whole(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns all of clip `index`: (mel [num_mels, T], wav [1, T * hop_size]).

        Raises:
            UserError: the clip or its mel cannot be used, or their lengths differ too much.
        """
        wav = self._open_wav(index)
        wav = wav.part(0, wav.samples)
        if self.mels_dir is None:
            mel = self.log_mel(wav[None, self.h.lead :])[0]
        else:
            mel = self._load_mel(index, frames=len(wav) // self.h.hop_size)
        frames = min(mel.shape[1], len(wav) // self.h.hop_size)
        return mel[:, :frames], wav[None, : frames * self.h.hop_size]

    def path(self, index: int) -> Path:
        """Returns the path of the audio file of clip `index`."""
        return self.wavs_dir / os.fsdecode(self.clips[index])

    def mel_path(self, index: int) -> Path:
        """Returns the path of the mel of clip `index`, if there is a `mels_dir`."""
        name = self._mel_name(index)
        return self.mels_dir / (find_file(self.mels_dir, name, (".npy",)) or f"{name}.npy")

    def _next_audible(self, index: int) -> tuple[int, Wav]:
        """Returns the first clip from `index` on that is not silent, and its waveform."""
        for candidate in (*range(index, len(self)), *range(index)):
            if candidate in self.silent:
                continue
            try:
                return candidate, self._open_wav(candidate)
            except SilenceError as error:
                self.silent.add(candidate)
                say(f"left out: {error}")
        raise UserError(f"{self.wavs_dir}: all clips of the list are silent")

    def _open_wav(self, index: int) -> Wav:
        """Opens clip `index` at its training level. The first time, reads and checks all of it."""
        arguments = self.path(index), self.h.sampling_rate, self.h.hop_size
        samples, peak = self.known[index]
        wav = open_wav(*arguments) if samples else None
        if wav is None or wav.samples != samples:
            whole = load_wav(*arguments)
            peak = whole.abs().max().numpy()
            self.known[index] = len(whole), peak
            wav = Wav(len(whole), lambda first, stop: whole[first:stop])
        if self.mels_dir is not None:  # the mels were computed at the clip's own level
            return _with_lead(wav, self.h.lead)
        gain = MAX_AMPLITUDE / torch.tensor(peak)
        return Wav(wav.samples, lambda first, stop: wav.part(first, stop) * gain)

    def _load_mel(self, index: int, frames: int) -> torch.Tensor:
        path = self.mel_path(index)
        mel = load_mel(path, self.h.num_mels)
        if abs(mel.shape[1] - frames) > MAX_EXTRA_FRAMES:
            raise UserError(
                f"{path}: {mel.shape[1]} frames, but {self.path(index)} has {frames} "
                f"(hop_size {self.h.hop_size}); expected at most {MAX_EXTRA_FRAMES} more or fewer"
            )
        return mel

    def _mel_name(self, index: int) -> str:
        """Returns the path of a mel in `mels_dir`, without extension; it equals the wav's."""
        clip = os.fsdecode(self.clips[index])
        if os.path.isabs(clip) or ".." in clip:
            clip = os.path.relpath(self.path(index), self.wavs_dir)
        return os.path.splitext(clip)[0]

    def _check_ids(self, file_list: str | Path) -> None:
        """Raises UserError for a clip outside of `wavs_dir`, whose mel would be outside as well."""
        for index in range(len(self)):
            if self._mel_name(index).startswith("../"):
                raise UserError(
                    f"{file_list}: {self.path(index)} lies outside of {self.wavs_dir}; expected "
                    "ids inside it, because the mel has the same id in --input_mels_dir"
                )


def blurred(mel: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Blurs a mel [num_mels, T] about as acoustic models do, by a Gaussian along each axis.

    FRAME_BLUR is the range of the standard deviation along time, in frames. BAND_BLUR is its range
    along frequency in the highest band, in bands. Lower bands are blurred less, by the square root
    of their index, because acoustic models predict the harmonics there well.
    """
    frames, bands = random.uniform(*FRAME_BLUR), random.uniform(*BAND_BLUR)
    num_mels, T = mel.shape
    index = torch.arange(max(num_mels, T))
    distance = (index - index[:, None]) ** 2
    along_time = (-0.5 / frames**2 * distance[:T, :T]).softmax(0)
    variance = bands**2 * (index[:num_mels, None] + 0.5) / num_mels
    along_frequency = (-0.5 / variance * distance[:num_mels, :num_mels]).softmax(1)
    return along_frequency @ mel @ along_time


def _with_lead(wav: Wav, lead: int) -> Wav:
    """Returns `wav` after `lead` samples of silence, which the generator's output has as well."""

    def part(first: int, stop: int) -> torch.Tensor:
        return F.pad(wav.part(max(0, first - lead), stop - lead), (max(0, lead - first), 0))

    return Wav(wav.samples + lead, part)


def _padded(x: torch.Tensor, length: int, value: float) -> torch.Tensor:
    """Pads x [..., n] at its end with `value` to [..., length]."""
    return F.pad(x, (0, length - x.shape[-1]), value=value)


def check_pairs(dataset: MelDataset) -> None:
    """Compares a sample of fine-tuning mels with the mels of their clips. Prints a mismatch.

    Training on mels of other clips, or with other settings, raises no error but is useless.

    Raises:
        UserError: as `MelDataset.whole`, but for silent clips.
    """
    count = min(PAIRS_TO_CHECK, len(dataset))
    mels, differing = [], []
    for index in (i * len(dataset) // count for i in range(count)):
        with contextlib.suppress(SilenceError):
            mel, wav = dataset.whole(index)
            mels.append((dataset.mel_path(index), mel))
            expected = dataset.log_mel(wav[:, dataset.h.lead :])[0]
            difference = dataset.h.log_amplitude_scale * float((expected - mel).abs().mean())
            if difference > MAX_PAIR_DIFFERENCE:
                differing.append((index, difference))
    if not differing:
        say_mel_warnings(mels, dataset.log_mel)
        return
    index, difference = differing[0]
    say(
        one_line(
            f"{dataset.mel_path(index)}: differs from the mel of {dataset.path(index)} by "
            f"{difference:.2f} on average; expected at most {MAX_PAIR_DIFFERENCE:g}: is it this "
            f"clip's, with the config's settings? {len(differing)} of {count} mels compared differ"
        )
    )


class ResumableBatchSampler(torch.utils.data.Sampler):
    """Yields the keys (epoch, index) of this rank's share of each batch, epoch after epoch.

    The order follows from (seed, epoch) alone, for any number of ranks. An incomplete last batch is
    dropped, as in HiFi-GAN. It starts at `epoch`, after `epoch_step` batches of it.
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
        "Writes the log-mels of audio files as <id>.npy, float32 [num_mels, T]. Use them to try\n"
        "fine-tuning and inference_e2e.py without an acoustic model, or to check the mels of one.",
        example="python meldataset.py --config config_v1.json --input_wavs_dir LJSpeech-1.1/wavs "
        "--output_dir ft_dataset",
    )
    parser.add_argument(
        "--config", metavar="FILE", required=True, help="JSON config, which defines the mel"
    )
    parser.add_argument(
        "--input_wavs_dir",
        metavar="PATH",
        required=True,
        help="audio: a folder, searched with its subfolders, or one file",
    )
    parser.add_argument(
        "--output_dir", metavar="DIR", required=True, help="for the mels; made if needed"
    )
    a = parser.parse_args()
    h = load_config(a.config)
    log_mel = LogMelSpectrogram(h, h.fmax)
    jobs = plan_outputs(a.input_wavs_dir, AUDIO_EXTENSIONS, a.output_dir, ending=".npy")
    with FileProgress(len(jobs), a.output_dir) as progress:
        for source, output in jobs:
            with progress.skipping():
                wav = load_wav(source, h.sampling_rate, min_samples=h.hop_size)
                write_npy(output, log_mel(wav.unsqueeze(0))[0].numpy())
                progress.written()
    return progress.status


if __name__ == "__main__":
    command_line(main)
