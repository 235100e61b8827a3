"""The listening page: one folder that any browser opens, from the disk or from any static host.

    python evaluate.py --reference_dir wavs --generated_dir A B --page listen

writes listen/index.html, after the template page.html, and listen/index_files/ with the sounds
and spectrograms.
"""

import html
import json
import os
import shutil
from pathlib import Path

import soundfile
from tqdm import tqdm

from audio import load_wav
from env import Config, UserError, one_line
from evaluation.plots import marked_bands, save_bare_spectrogram
from evaluation.report import RECORDINGS, arrow, between, count_files, difference_cell, number
from meldataset import LogMelSpectrogram
from utils import WriteError, atomic_write

TEMPLATE = Path(__file__).with_name("page.html")
FILES = "index_files"  # beside index.html; written anew each time
MARK = '<meta name="generator" content="MISRNet evaluate.py --page">'  # of TEMPLATE
PLAYED = {"FLAC": ".flac", "MP3": ".mp3", "OGG": ".ogg", "WAV": ".wav", "WAVEX": ".wav"}
PLAYED_SUBTYPES = ("PCM_U8", "PCM_16", "PCM_24", "FLOAT")  # of the last two


def check_page(folder: Path, given: list[Path]) -> None:
    """Makes `folder`, before hours of measuring.

    Raises:
        UserError: `folder` holds another page, or is part of, or would overwrite, a `given` one.
        WriteError: it cannot be made.
    """
    for other in given:
        inner, outer = (folder / FILES).resolve(), other.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise UserError(f"--page {folder}: is part of {other}; use a folder beside it")
    page = folder / "index.html"
    try:
        if page.exists() and MARK not in page.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{page}: another page; remove it or pass another --page")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written ({error.strerror or error})") from None


def write_page(folder: Path, report: dict, h: Config) -> None:
    """Writes the page of a report: index.html, once its sounds and pictures are there.

    Raises:
        UserError, WriteError: a file cannot be read, or not be written.
    """
    shutil.rmtree(folder / FILES, ignore_errors=True)
    log_mel = LogMelSpectrogram(h, fmax=None)  # all that one can hear, also above the loss
    clips = [
        _clip(folder, i, file, report, log_mel, h)
        for i, file in enumerate(tqdm(report["files"], unit="clip", desc="page", disable=None), 1)
    ]
    parts = {
        "title": "Listen and compare",
        "summary": _summary(report),
        "means": _means(report),
        "differences": _differences(report),
        "meanings": _meanings(report),
        "sortings": _sortings(report),
        "systems": "".join(f"<option>{_text(name)}</option>" for name in _generated(report)),
        "columns": str(len(report["systems"])),
        "clips": "\n".join(clips),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    for name, part in parts.items():
        page = page.replace(f"<!-- {name} -->", part)  # _text leaves no such comment in a part
    with atomic_write(folder / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def _text(text: str) -> str:
    return html.escape(one_line(text))


def _generated(report: dict) -> list[str]:
    return [name for name in report["systems"] if name != RECORDINGS]


# ------------------------------------------------------------------------------------- the clips


def _clip(
    folder: Path, index: int, file: dict, report: dict, log_mel: LogMelSpectrogram, h: Config
) -> str:
    """A row: writes the sounds and pictures of a clip, and returns its HTML."""
    paths = {name: found["paths"]["generated"] for name, found in file["systems"].items()}
    paths[RECORDINGS] = next(iter(file["systems"].values()))["paths"]["reference"]
    wavs = {
        name: load_wav(path, h.sampling_rate, h.hop_size, min_peak=0)
        for name, path in paths.items()
    }
    mels = {name: log_mel(wav[None])[0].numpy() for name, wav in wavs.items()}
    longest = max(mel.shape[1] for mel in mels.values())
    values = {name: found["values"] for name, found in file["systems"].items()}
    marks, cells = _best_and_worst(values, report), []
    for column, system in enumerate(report["systems"]):
        if system not in mels:
            words = f"{_text(system)}: no such file, or none that can be read"
            cells.append(f'<div class="cell empty" data-system="{_text(system)}">{words}</div>')
            continue
        stem = folder / FILES / f"{index:04}-{column}"
        with atomic_write(stem.with_suffix(".png")) as temporary:
            save_bare_spectrogram(mels[system], temporary)
        own = values.get(system, {})
        cells.append(
            f'<div class="cell" data-system="{_text(system)}" data-values="{_json(own)}">'
            f'<button type="button" class="jump"><kbd></kbd> <span>{_text(system)}</span></button>'
            f"{_picture(stem.name, system, mels[system].shape[1] / longest, h)}"
            f'<audio controls preload="none" src="{FILES}/{_copy_sound(paths[system], stem)}">'
            f"</audio><dl>{_values(own, marks.get(system, {}), report)}</dl>"
            '<div class="vote"></div></div>'
        )
    seconds, name = longest * h.hop_size / h.sampling_rate, _text(file["name"])
    return (
        f'<article class="clip" data-name="{name}" data-seconds="{seconds:.4f}" tabindex="-1">'
        f"<h3>{name} <small>{seconds:.1f} s</small></h3>"
        f'<div class="cells">{"".join(cells)}</div><p class="vote"></p></article>'
    )


def _picture(stem: str, system: str, width: float, h: Config) -> str:
    """The spectrogram, so wide of its cell, with Hz beside it and a line where the sound is."""
    axis = "".join(
        f'<span style="bottom:{100 * band / h.num_mels:.1f}%">{hertz // 1000}k</span>'
        for hertz, band in marked_bands(h, None).items()
        if hertz >= 1000  # lower ones would lie one on the other
    )
    return (
        f'<div class="picture"><img src="{FILES}/{stem}.png" alt="spectrogram of {_text(system)}" '
        f'loading="lazy" style="width:{100 * width:.2f}%">'
        f'<div class="axis" aria-hidden="true">{axis}</div><i></i></div>'
    )


def _json(value: object) -> str:
    return html.escape(json.dumps(value))


def _values(values: dict, marks: dict[str, str], report: dict) -> str:
    rows = []
    for name, facts in report["metrics"].items():
        if name not in values:  # of a recording
            continue
        mark = marks.get(name, "")
        note = f" <em>{mark}</em>" if mark else ""
        rows.append(
            f'<div class="{mark}"><dt>{name} {arrow(facts)}</dt>'
            f"<dd>{note} {number(values[name])}</dd></div>"
        )
    return "".join(rows)


def _best_and_worst(values: dict[str, dict], report: dict) -> dict[str, dict[str, str]]:
    """The marks, "best" or "worst", of the generated systems' values: by system and metric."""
    marks: dict[str, dict[str, str]] = {}
    for metric, facts in report["metrics"].items():
        found = {name: values.get(name, {}).get(metric) for name in _generated(report)}
        known = {name: value for name, value in found.items() if value is not None}
        if len(set(known.values())) < 2:
            continue
        worst, best = min(known.values()), max(known.values())
        if facts["better"] == "lower":
            worst, best = best, worst
        for name, value in known.items():
            if value in (worst, best):
                marks.setdefault(name, {})[metric] = "best" if value == best else "worst"
    return marks


def _copy_sound(path: str, stem: Path) -> str:
    """Copies a file that browsers play, turns another into FLAC; returns the name of the copy."""
    info = soundfile.info(os.fsencode(path))
    ending = PLAYED.get(info.format)
    if ending == ".wav" and info.subtype not in PLAYED_SUBTYPES:
        ending = None
    copy = stem.with_suffix(ending or ".flac")
    with atomic_write(copy) as temporary:
        if ending:
            shutil.copyfile(path, temporary)
        else:
            wav, rate = soundfile.read(os.fsencode(path))
            soundfile.write(temporary, wav, rate, format="FLAC", subtype="PCM_24")
    return copy.name


# ------------------------------------------------------------------------------------ the tables


def _summary(report: dict) -> str:
    systems = _generated(report)
    lines = [f"{len(report['files'])} clips: the recordings, and {', '.join(systems)}."]
    for name in systems:
        samples = report["systems"][name]["delay_samples"]
        if samples:
            lines.append(f"{name}: a delay of {samples} samples was made up for in its numbers.")
    return _text(" ".join(lines))


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A table of HTML cells, of which the first of each row names it."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = [
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    ]
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _means(report: dict) -> str:
    means = {
        system: {
            name: facts["systems"][system]["mean"] for name, facts in report["metrics"].items()
        }
        for system in report["systems"]
    }
    marks, rows = _best_and_worst(means, report), []
    for name, facts in report["metrics"].items():
        cells = []
        for system, each in facts["systems"].items():
            mark = marks.get(system, {}).get(name, "")
            cells.append(
                f'<span class="{mark}">{number(each["mean"])} <em>{mark}</em></span>'
                f"<small>{between(each)}</small>"
            )
        rows.append([f"{name} {arrow(facts)}", *cells])
    clips = [str(count_files(report, system)) for system in report["systems"]]
    return _table(["metric", *map(_text, report["systems"])], [*rows, ["clips", *clips]])


def _differences(report: dict) -> str:
    """As report.difference_table, a row a pair and metric, those of note in bold."""
    rows = []
    for name, facts in report["metrics"].items():
        for each in facts["differences"]:
            cell = difference_cell(each)
            bold = f"<b>{cell.strip('*')}</b>" if cell.startswith("**") else cell
            pair = _text(f"{each['system']} - {each['minus']}")
            rows.append([f"{name} {arrow(facts)}", pair, bold, str(each["n"])])
    return _table(["metric", "difference", "mean and interval", "clips"], rows)


def _meanings(report: dict) -> str:
    return "".join(
        f"<dt>{name} ({_text(facts['unit'])}; {facts['better']} is better)</dt>"
        f"<dd>{_text(facts['description'])}</dd>"
        for name, facts in report["metrics"].items()
    )


def _sortings(report: dict) -> str:
    return "".join(
        f'<option value="{name}" data-better="{facts["better"]}">{name}, worst first</option>'
        for name, facts in report["metrics"].items()
    )
