"""Pairs of a recording and the speech generated from it: files by name, and a delay between them.

a/b.flac and a/b_generated.wav are one pair
"""

import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from audio import AUDIO_EXTENSIONS, load_wav
from env import Config, UserError
from evaluation.metrics import SIDES, Pair
from evaluation.report import RECORDINGS
from utils import find_files

ENDINGS = ("_generated", "_generated_e2e")  # what the inference scripts add to a name

DELAY_HOPS = 2  # so much, either way, is looked for
DELAY_CLIPS = 32  # that are looked at
SAME_DELAY = 1 / 8  # hops, within which those of most clips must lie to be constant
MOST = 3 / 4
SMALLEST_DELAY = 1 / 16  # hops; what is nearer to zero is taken for none


class FilePair(NamedTuple):
    """Two files of one name, which is relative to their folders and has no extension."""

    name: str
    reference: Path
    generated: Path
    system: str = ""


def name_systems(folders: list[Path]) -> dict[str, Path]:
    """The folders by name: the last parts of each path, as many as tell it from the others.

    Raises:
        UserError: a folder is given twice.
    """
    paths = [folder.resolve().parts for folder in folders]
    names: dict[str, Path] = {}
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"--generated_dir {folder}: given twice")
        for count in range(1, len(path) + 1):
            name = "/".join(path[-count:])
            if sum(each[-count:] == path[-count:] for each in paths) == 1 and name != RECORDINGS:
                break
        names[name] = folder
    return names


def pair_files(
    reference_dir: str | Path,
    generated_dir: str | Path,
    others: list[Path] | tuple = (),
    system: str = "",
) -> tuple[list[FilePair], list[str], list[str]]:
    """Pairs the audio files of two folders, in depth, by name: `a/b.flac` and `a/b_generated.wav`.

    What lies in one of the `others` inside a folder is not that folder's.

    Returns:
        The pairs, and the references and the generated files without a partner.

    Raises:
        UserError: no such folder, no pair, or more than one file for one name.
    """
    folders = Path(reference_dir), Path(generated_dir)
    if folders[0].resolve() == folders[1].resolve():
        raise UserError(f"{generated_dir}: reference and generated files in one folder; use two")
    references, generated = (_by_name(folder, {*folders, *others}) for folder in folders)
    pairs = []
    for name, path in references.items():
        names = [name, *(name + end for end in ENDINGS if name + end not in references)]
        found = [generated[each] for each in names if each in generated]
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1]} are both named after {path}; keep one")
        pairs += [FilePair(name, path, each, system) for each in found]
    if not pairs:
        raise UserError(
            f"{generated_dir}: no audio file is named as one in {reference_dir}; expected <name> "
            f"{' '.join(f'or <name>{end}' for end in ENDINGS)} in the same subfolder"
        )
    left = [set(references.values()), set(generated.values())]
    for pair in pairs:
        left[0].remove(pair.reference)
        left[1].remove(pair.generated)
    return pairs, *(sorted(map(str, paths)) for paths in left)


def _by_name(folder: Path, given: set[Path]) -> dict[str, Path]:
    """The audio files of `folder`, but for those of another `given` folder inside it, by name."""
    if not os.path.isdir(folder):  # Path.is_dir raises where a name is too long
        raise UserError(f"{folder}: no such folder")
    whole = folder.resolve()
    inner = [each for each in (path.resolve() for path in given) if whole in each.parents]
    files = {}
    for path in find_files(folder):
        if path.suffix.lower() not in AUDIO_EXTENSIONS:
            continue
        if any(path.resolve().is_relative_to(each) for each in inner):
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise UserError(f"{files[name]} and {path} have one name; keep one")
        files[name] = path
    return files


def load_pair(files: FilePair, h: Config) -> dict[str, torch.Tensor]:
    """Both waveforms [N], by SIDES; raises UserError as `load_wav` does."""
    return {
        side: load_wav(getattr(files, side), h.sampling_rate, min_samples=h.hop_size, min_peak=0)
        for side in SIDES
    }


def shift(wavs: dict[str, torch.Tensor], delay: int) -> dict[str, torch.Tensor]:
    """Waveforms that begin together, where the generated one lags by `delay` samples."""
    late = "generated" if delay > 0 else "reference"
    return wavs | {late: wavs[late][abs(delay) :]}


def find_delay(files: FilePair, h: Config) -> int | None:
    """By how many samples the generated file lags: where the mel error is least.

    From two hops before to two after, to a sample; phases play no part. None for a file that cannot
    be read or is too short.
    """
    try:
        wavs = load_pair(files, h)
    except UserError:
        return None
    reach, errors = DELAY_HOPS * h.hop_size, {}
    if min(map(len, wavs.values())) < 2 * reach + h.hop_size:
        return None

    def error(delay: int) -> float:
        if delay not in errors:
            errors[delay] = F.l1_loss(*Pair(**shift(wavs, delay), h=h).mels).item()
        return errors[delay]

    step = max(1, h.hop_size // 4)
    best = min(sorted(range(-reach, reach + 1, step), key=abs), key=error)
    while step > 1:
        step = -(-step // 2)
        best = min((best, best - step, best + step), key=error)
    return best


def constant_delay(delays: list[int | None], hop_size: int) -> int:
    """The delay that most clips share, in samples; 0 where they share none."""
    known = [delay for delay in delays if delay is not None]
    if not known:
        return 0
    middle = sorted(known)[len(known) // 2]
    near = sum(abs(delay - middle) <= SAME_DELAY * hop_size for delay in known)
    is_constant = near >= MOST * len(known) and abs(middle) > SMALLEST_DELAY * hop_size
    return middle if is_constant else 0
