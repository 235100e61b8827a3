"""The listening page: a folder that any browser opens, from the disk or from any static host.

    python evaluate.py --reference_dir wavs --generated_dir A B --page listen

writes listen/index.html, from the template page.html, and listen/index_files/ with the sounds and
spectrograms. Clips come first, then the means.
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
from evaluation.report import (
    RECORDINGS,
    arrow,
    between,
    count_files,
    difference_cell,
    groups_of,
    number,
    systems_of,
)
from meldataset import LogMelSpectrogram, hifigan_recipe
from utils import WriteError, atomic_write

TEMPLATE = Path(__file__).with_name("page.html")
TITLE = "Listen and compare"
FILES = "index_files"  # the folder beside index.html; written anew each time
MARK = '<meta name="generator" content="MISRNet evaluate.py --page">'  # a line of TEMPLATE
SHOWN = ("distill_mos", "plcmos", "pesq_wb", "mel_l1")  # the other metrics are folded
PLAYED = {"FLAC": ".flac", "MP3": ".mp3", "OGG": ".ogg", "WAV": ".wav", "WAVEX": ".wav"}
PLAYED_SUBTYPES = ("PCM_U8", "PCM_16", "PCM_24", "FLOAT")  # of WAV files, that browsers play


def check_page(folder: Path, given: list[Path]) -> None:
    """Creates `folder` before the measurement, which may take hours.

    Raises:
        UserError: `folder` has another page, or overlaps with a `given` folder.
        WriteError: it cannot be created.
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
    """Writes the page of a report: sounds and spectrograms first, then index.html.

    Raises:
        UserError: a file cannot be read.
        WriteError: a file cannot be written.
    """
    shutil.rmtree(folder / FILES, ignore_errors=True)
    groups = groups_of(report)
    writer = ClipWriter(folder, h)
    total = sum(len(group["files"]) for group in groups)
    with tqdm(total=total, unit="clip", desc="page", disable=None) as progress:
        clips = [_clips(report, group, writer, progress) for group in groups]
    generated = [name for name in report["systems"] if name != RECORDINGS]
    parts = {
        "title": TITLE,
        "summary": _summary(report),
        "systems": _systems(report),
        "sortings": _sortings(report),
        "options": "".join(f"<option>{_text(name)}</option>" for name in generated),
        "clips": "\n".join(clips),
        "means": "\n".join(_means(report, group) for group in groups),
        "meanings": _meanings(report),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    for name, part in parts.items():
        page = page.replace(f"<!-- {name} -->", part)  # _text leaves no such comment in a part
    with atomic_write(folder / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def _text(text: str) -> str:
    return html.escape(one_line(text))


def _label(system: str) -> str:
    return "recording" if system == RECORDINGS else _text(system)


def _heading(report: dict, group: dict) -> str:
    if group is report and RECORDINGS in report["systems"]:
        return "Copies of recordings"
    return "Speech without a recording"


def _shown(metrics: dict) -> list[str]:
    """Returns the names of the metrics that are not folded."""
    return [name for name in SHOWN if name in metrics] or [*metrics][: len(SHOWN)]


# ------------------------------------------------------------------------------------- the clips


def _clips(report: dict, group: dict, writer: "ClipWriter", progress: tqdm) -> str:
    """Returns the section of a group, and writes its sounds and spectrograms."""
    found = {name for file in group["files"] for name in file["systems"]}
    if group is report:
        found.add(RECORDINGS)
    systems = [name for name in report["systems"] if name in found]
    clips = []
    for file in group["files"]:
        clips.append(writer.write(file, systems, group["metrics"]))
        progress.update()
    has_recordings = systems[:1] == [RECORDINGS]
    words = (
        "The first player of each clip is the recording."
        if has_recordings
        else "No recording exists of these clips, for example because an acoustic model predicted "
        "their mels."
    )
    return (
        f'<section class="group"><h2>{_heading(report, group)}</h2><p class="soft">{words}</p>'
        f'<div class="clips" style="--columns:{len(systems)}">{"".join(clips)}</div></section>'
    )


class ClipWriter:
    """Writes the files of clips to `folder`/FILES and returns their HTML."""

    def __init__(self, folder: Path, h: Config):
        self.folder, self.h = folder, h
        self.log_mel = LogMelSpectrogram(hifigan_recipe(h), fmax=None)  # all that is audible
        self.count = 0

    def write(self, file: dict, systems: list[str], metrics: dict) -> str:
        """Returns the HTML of a clip, an entry of a group's "files"."""
        self.count += 1
        h, found = self.h, file["systems"]
        paths = {name: each["paths"]["generated"] for name, each in found.items()}
        recordings = [each["paths"].get(RECORDINGS) for each in found.values()]
        if RECORDINGS in systems:
            paths.setdefault(RECORDINGS, next(filter(None, recordings)))
        wavs = {
            name: load_wav(path, h.sampling_rate, h.hop_size, min_peak=0)
            for name, path in paths.items()
        }
        mels = {name: self.log_mel(wav[None])[0].numpy() for name, wav in wavs.items()}
        frames = max(mel.shape[1] for mel in mels.values())
        values = {name: each["values"] for name, each in found.items()}
        marks, cells = _best_and_worst(values, metrics), []
        for column, system in enumerate(systems):
            if system not in mels:
                cells.append(_empty_cell(system))
                continue
            stem = self.folder / FILES / f"{self.count:04}-{column}"
            with atomic_write(stem.with_suffix(".png")) as temporary:
                save_bare_spectrogram(mels[system], temporary)
            cells.append(
                _cell(system, values.get(system, {}), marks.get(system, {}), metrics)
                .replace("<!-- sound -->", f"{FILES}/{_copy_sound(paths[system], stem)}")
                .replace("<!-- picture -->", self._spectrogram(stem.name, system, mels, frames))
            )
        seconds, name = frames * h.hop_size / h.sampling_rate, _text(file["name"])
        return (
            f'<article class="clip" data-name="{name}" data-seconds="{seconds:.4f}" tabindex="-1">'
            f"<h3>{name} <small>{seconds:.1f} s</small></h3>"
            f'<div class="cells">{"".join(cells)}</div><p class="vote"></p>'
            f"{_folded(systems, values, marks, metrics)}</article>"
        )

    def _spectrogram(self, stem: str, system: str, mels: dict, frames: int) -> str:
        """Returns the spectrogram with its axis in Hz and the line at the current time."""
        axis = "".join(
            f'<span style="bottom:{100 * band / self.h.num_mels:.1f}%">{hertz // 1000}k</span>'
            for hertz, band in marked_bands(self.h, None).items()
            if hertz >= 1000  # lower marks would overlap
        )
        width = 100 * mels[system].shape[1] / frames
        return (
            f'<div class="picture"><img src="{FILES}/{stem}.png" alt="spectrogram" loading="lazy" '
            f'style="width:{width:.2f}%"><div class="axis" aria-hidden="true">{axis}</div>'
            "<i></i></div>"
        )


def _empty_cell(system: str) -> str:
    words = f"{_label(system)}: no such file, or none that can be read"
    return f'<div class="cell empty" data-system="{_text(system)}">{words}</div>'


def _cell(system: str, values: dict, marks: dict, metrics: dict) -> str:
    rows = "".join(
        f'<div class="{marks.get(name, "")}"><dt>{metrics[name]["label"]} {arrow(metrics[name])}'
        f"</dt><dd>{_marked(values[name], marks.get(name, ''))}</dd></div>"
        for name in _shown(metrics)
        if name in values
    )
    kind = " data-recording" if system == RECORDINGS else ""
    return (
        f'<div class="cell" data-system="{_text(system)}" data-label="{_label(system)}"{kind} '
        f'data-values="{html.escape(json.dumps(values))}">'
        f'<button type="button" class="jump"><kbd></kbd> <span>{_label(system)}</span></button>'
        '<!-- picture --><audio controls preload="none" src="<!-- sound -->"></audio>'
        f'<dl>{rows}</dl><div class="vote"></div></div>'
    )


def _marked(value: float | None, mark: str) -> str:
    return f"<em>{mark}</em> {number(value)}" if mark else number(value)


def _folded(systems: list[str], values: dict, marks: dict, metrics: dict) -> str:
    """Returns a folded table of all metrics of a clip, or "" if the cells show them all."""
    if len(_shown(metrics)) == len(metrics):
        return ""
    rows = []
    for system in (name for name in systems if name in values):
        own, known = values[system], marks.get(system, {})
        cells = [
            f'<span class="{known.get(name, "")}">{_marked(own[name], known.get(name, ""))}</span>'
            if name in own
            else ""
            for name in metrics
        ]
        rows.append([_label(system), *cells])
    table = _table(["system", *_labels(metrics)], rows)
    return f'<details class="open"><summary>All metrics of this clip</summary>{table}</details>'


def _best_and_worst(values: dict[str, dict], metrics: dict) -> dict[str, dict[str, str]]:
    """Returns the marks "best" and "worst" of the generated systems, by system and metric."""
    marks: dict[str, dict[str, str]] = {}
    for metric, facts in metrics.items():
        found = {name: own.get(metric) for name, own in values.items() if name != RECORDINGS}
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
    """Copies a file that browsers play, converts another to FLAC; returns the new file's name."""
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


# ------------------------------------------------------------------------- the words and tables


def _summary(report: dict) -> str:
    generated = [name for name in report["systems"] if name != RECORDINGS]
    clips = sum(len(group["files"]) for group in groups_of(report))
    lines = [f"{clips} clips of {len(generated)} {'system' if len(generated) == 1 else 'systems'}."]
    for name in generated:
        samples = report["systems"][name]["delay_samples"]
        if samples:
            lines.append(f"The metrics of {name} compensate a delay of {samples} samples.")
    return _text(" ".join(lines))


def _systems(report: dict) -> str:
    """Returns the list of systems with the lines of --about; "" without such lines."""
    about = {name: facts["about"] for name, facts in report["systems"].items()}
    if not any(about.values()):
        return ""
    rows = (
        f"<div><dt>{_label(name)}</dt><dd>{_text(text)}</dd></div>"
        for name, text in about.items()
        if text
    )
    return (
        '<details class="about open"><summary>What the systems are</summary>'
        f'<dl class="systems">{"".join(rows)}</dl></details>'
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a table of HTML cells, whose rows start with a heading, that scrolls sideways."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = [
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    ]
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _labels(metrics: dict) -> list[str]:
    return [f"{facts['label']} {arrow(facts)}" for facts in metrics.values()]


def _means(report: dict, group: dict) -> str:
    """Returns the means of a group: the shown metrics, then all of them and differences, folded."""
    metrics = group["metrics"]
    shown = {name: metrics[name] for name in _shown(metrics)}
    folded = (
        f"<details><summary>All metrics</summary>{_mean_table(group, metrics)}</details>"
        if len(shown) < len(metrics)
        else ""
    )
    return (
        f"<h3>{_heading(report, group)}</h3>"
        # On phones, this class hides the intervals, which the folded table repeats.
        f'<div class="{"shown" if folded else ""}">{_mean_table(group, shown)}</div>{folded}'
        "<details><summary>Differences between systems over the same clips</summary>"
        "<p>Mean of the differences clip by clip, with its interval. Bold: the interval excludes "
        f"zero.</p>{_differences(group)}</details>"
    )


def _mean_table(group: dict, metrics: dict) -> str:
    systems = systems_of(group)
    means = {
        system: {name: facts["systems"][system]["mean"] for name, facts in metrics.items()}
        for system in systems
    }
    marks, rows = _best_and_worst(means, metrics), []
    for system in systems:
        cells = []
        for name, facts in metrics.items():
            mark, each = marks.get(system, {}).get(name, ""), facts["systems"][system]
            cells.append(
                f'<span class="{mark}">{number(each["mean"])} <em>{mark}</em></span>'
                f"<small>{between(each)}</small>"
            )
        rows.append([_label(system), *cells, str(count_files(group, system))])
    return _table(["system", *_labels(metrics), "clips"], rows)


def _differences(group: dict) -> str:
    rows = []
    for facts in group["metrics"].values():
        for each in facts["differences"]:
            cell = difference_cell(each)
            bold = f"<b>{cell.strip('*')}</b>" if cell.startswith("**") else cell
            pair = f"{_label(each['system'])} - {_label(each['minus'])}"
            rows.append([f"{facts['label']} {arrow(facts)}", pair, bold, str(each["n"])])
    return _table(["metric", "difference", "mean and interval", "clips"], rows)


def _meanings(report: dict) -> str:
    return "".join(
        f"<dt>{facts['label']} ({_text(facts['unit'])}; {facts['better']} is better)</dt>"
        f"<dd>{_text(facts['description'])}</dd>"
        for facts in report["metrics"].values()
    )


def _sortings(report: dict) -> str:
    return "".join(
        f'<option value="{name}" data-better="{facts["better"]}">{facts["label"]}, worst first'
        "</option>"
        for name, facts in report["metrics"].items()
    )
