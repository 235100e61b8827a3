"""Pairs of a recording and the speech generated from it: files by name, and the delay between them.

recordings/a/b.flac and generated/a/b_generated.wav form the pair "a/b".
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from audio import AUDIO_EXTENSIONS, load_wav
from env import Config, UsageError, UserError
from evaluation.metrics import SIDES, Pair
from evaluation.report import RECORDINGS
from utils import composed, find_files

ENDINGS = ("_generated_e2e", "_generated")  # added by inference_e2e.py and inference.py

DELAY_HOPS = 2  # the largest lag and the largest lead that are searched
DELAY_CLIPS = 32  # at most so many clips are searched
SAME_DELAY = 1 / 8  # hops; delays this close count as the same
MOST = 3 / 4  # the share of clips with the same delay that makes it constant
SMALLEST_DELAY = 1 / 16  # hops; a smaller delay counts as none


class FilePair(NamedTuple):
    """A generated file and its recording, if it has one.

    `name` is the path relative to the folder, without extension and ENDINGS.
    """

    name: str
    reference: Path | None
    generated: Path
    system: str = ""

    @property
    def paths(self) -> dict[str, str]:
        """The files by SIDES."""
        found = zip(SIDES, (self.reference, self.generated), strict=True)
        return {side: str(path) for side, path in found if path is not None}


def name_systems(given: list[str]) -> dict[str, Path]:
    """Returns the folders of `given`, each `DIR` or `NAME=DIR`, by the names of their systems.

    A folder without a name is called by the last parts of its path, as many as are needed to tell
    it from the others.

    Raises:
        UsageError: a folder or a name is given twice, or a system has the name of the recordings.
    """
    names, folders = zip(*map(_split_name, given), strict=True)
    paths = [folder.resolve().parts for folder in folders]
    systems: dict[str, Path] = {}
    for name, folder, path in zip(names, folders, paths, strict=True):
        if paths.count(path) > 1:
            raise UsageError(f"--generated_dir {folder}: given twice")
        name = name or _shortest_name(path, paths)
        if name in systems or name == RECORDINGS:
            raise UsageError(f"--generated_dir {name}={folder}: the name {name} is already used")
        systems[name] = folder
    return systems


def _split_name(given: str) -> tuple[str, Path]:
    name, equals, folder = given.partition("=")
    is_named = equals and not os.path.isdir(given)
    return (name, Path(folder)) if is_named else ("", Path(given))


def _shortest_name(path: tuple[str, ...], paths: list[tuple[str, ...]]) -> str:
    for count in range(1, len(path)):
        name = "/".join(path[-count:])
        if sum(each[-count:] == path[-count:] for each in paths) == 1 and name != RECORDINGS:
            return name
    return "/".join(path)


def pair_files(
    reference_dir: str | Path,
    generated_dir: str | Path,
    others: Iterable[Path] = (),
    system: str = "",
) -> tuple[list[FilePair], list[Path], dict[str, Path]]:
    """Pairs the audio files of two folders by name; subfolders are searched.

    A folder of `others` inside one of the two does not belong to it.

    Returns:
        The pairs, the recordings without a generated file, and the generated files without a
        recording, by name.

    Raises:
        UserError: no such folder, no pair, or two files with the same name.
    """
    folders = Path(reference_dir), Path(generated_dir)
    if folders[0].resolve() == folders[1].resolve():
        raise UserError(f"{generated_dir}: reference and generated files in one folder; use two")
    references, generated = (_by_name(folder, {*folders, *others}) for folder in folders)
    pairs: list[FilePair] = []
    used: set[str | Path] = set()
    for name, path in references.items():
        # "a_generated" is the copy of "a", unless a recording has that name.
        names = [name, *(name + end for end in ENDINGS if name + end not in references)]
        found = [each for each in names if each in generated]
        if len(found) > 1:
            one, other = (generated[each] for each in found[:2])
            raise UserError(f"{one} and {other} are both named after {path}; keep one")
        pairs += [FilePair(name, path, generated[each], system) for each in found]
        used |= {*found, path} if found else set()
    if not pairs:
        raise UserError(
            f"{generated_dir}: no audio file is named as one in {reference_dir}; expected <name> "
            f"{' '.join(f'or <name>{end}' for end in ENDINGS)} in the same subfolder"
        )
    without = [path for path in references.values() if path not in used]
    return pairs, without, {name: path for name, path in generated.items() if name not in used}


def list_files(generated_dir: str | Path, others: Iterable[Path]) -> dict[str, Path]:
    """Returns the audio files of a folder by name, for `without_reference`.

    Raises:
        UserError: no such folder, no audio file, or two files with the same name.
    """
    files = _by_name(Path(generated_dir), set(others))
    if not files:
        raise UserError(f"{generated_dir}: no audio file; expected {', '.join(AUDIO_EXTENSIONS)}")
    return files


def without_reference(generated: dict[str, Path], system: str) -> list[FilePair]:
    """Returns the files of `list_files`, or those that `pair_files` left over, as FilePairs.

    Raises:
        UserError: two files have the same name without ENDINGS.
    """
    found: dict[str, Path] = {}
    for name, path in generated.items():
        for ending in ENDINGS:
            name = name.removesuffix(ending)
        if name in found:
            raise UserError(f"{found[name]} and {path} have one name; keep one")
        found[name] = path
    return [FilePair(name, None, path, system) for name, path in found.items()]


def _by_name(folder: Path, given: set[Path]) -> dict[str, Path]:
    """Returns the audio files of `folder`, without those of a `given` folder inside it, by name.

    Names are in NFC: Macs write accents in NFD.
    """
    if not os.path.isdir(folder):  # Path.is_dir raises if a name is too long
        raise UserError(f"{folder}: no such folder")
    whole = folder.resolve()
    inner = [each for each in (path.resolve() for path in given) if whole in each.parents]
    files: dict[str, Path] = {}
    for path in find_files(folder):
        if path.suffix.lower() not in AUDIO_EXTENSIONS:
            continue
        if any(path.resolve().is_relative_to(each) for each in inner):
            continue
        name = composed(path.relative_to(folder).with_suffix("").as_posix())
        if name in files:
            is_same = files[name].with_suffix("") == path.with_suffix("")
            form = "" if is_same else ", with composed and decomposed accents (NFC, NFD)"
            raise UserError(f"{files[name]} and {path} have one name{form}; keep one")
        files[name] = path
    return files


def load_pair(files: FilePair, h: Config) -> dict[str, torch.Tensor]:
    """Returns both waveforms [N] by SIDES; without a reference, the generated one for both.

    Raises:
        UserError: as `load_wav`.
    """
    wavs = {
        side: load_wav(path, h.sampling_rate, min_samples=h.hop_size, min_peak=0)
        for side, path in files.paths.items()
    }
    return {"reference": wavs["generated"]} | wavs


def shift(wavs: dict[str, torch.Tensor], delay: int) -> dict[str, torch.Tensor]:
    """Returns waveforms that start together: cuts `delay` samples off the later one."""
    late = "generated" if delay > 0 else "reference"
    return wavs | {late: wavs[late][abs(delay) :]}


def find_delay(files: FilePair, h: Config) -> int | None:
    """Returns the samples by which the generated file lags: the delay of the smallest mel error.

    The search has a resolution of one sample and covers DELAY_HOPS hops in both directions. The
    result is None for a file that cannot be read or is too short.
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
    """Returns the delay in samples that most clips share, or 0 if there is none."""
    known = [delay for delay in delays if delay is not None]
    if not known:
        return 0
    middle = sorted(known)[len(known) // 2]
    near = sum(abs(delay - middle) <= SAME_DELAY * hop_size for delay in known)
    is_constant = near >= MOST * len(known) and abs(middle) > SMALLEST_DELAY * hop_size
    return middle if is_constant else 0
