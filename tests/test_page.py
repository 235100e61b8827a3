"""The listening page, as written and, if there is a Chromium, as a person uses it."""

import json
import re
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import evaluate
from env import UserError
from evaluation import page as listening_page
from evaluation.metrics import METRICS
from evaluation.plots import save_bare_spectrogram
from tests.browser import needs_browser, open_browser
from tools.toy import run_main, speech_like

RATE = 22050
SYSTEMS = ("reference", "fine", "rough")
NAMES = ("first", "second", "third")
# Noise, of full scale: the second clip is the worst of "rough", the third of "fine".
NOISE = {"fine": (0.001, 0.002, 0.008), "rough": (0.02, 0.08, 0.04)}
ABOUT = ("fine=one & only", "rough=noisy")


def write(path: Path, wav: np.ndarray, **kind) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, RATE, **kind)
    return path


def write_folders(folder: Path) -> list[Path]:
    """Writes three clips each into reference, fine and rough."""
    noise = np.random.default_rng(0).standard_normal(3 * RATE)
    for i, name in enumerate(NAMES):
        wav = speech_like(2.0, seed=i)
        write(folder / f"reference/{name}.flac", wav)
        for system, amounts in NOISE.items():
            write(folder / system / f"{name}_generated.wav", wav + amounts[i] * noise[: len(wav)])
    return [folder / name for name in SYSTEMS]


def make_page(folder: Path, *flags, generated: tuple[str, ...] = SYSTEMS[1:]) -> Path:
    """Runs evaluate.py with two metrics on the folders in `folder`; returns index.html."""
    given = ("--reference_dir", folder / "reference")
    given += ("--generated_dir", *(folder / name for name in generated))
    flags = flags if "--page" in flags else ("--page", folder / "page", *flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "METRICS", [m for m in METRICS if m.name in ("mel_l1", "stoi")])
        assert run_main(evaluate, *given, "--workers", 1, *flags) == 0
    return Path(flags[1]) / "index.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Three copies of recordings and, of "fine" and "rough", a fourth clip without one."""
    folder = tmp_path_factory.mktemp("page")
    write_folders(folder)
    for system in SYSTEMS[1:]:
        write(folder / system / "tts_generated_e2e.wav", speech_like(2.0, seed=4))
    return make_page(folder, "--output", folder / "results.json", "--unpaired", "--about", *ABOUT)


class Links(HTMLParser):
    """The files that a page loads."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href")]


# ------------------------------------------------------------------------------------ as written


def test_every_file_of_the_page_is_there_and_none_is_elsewhere(page):
    text = page.read_text(encoding="utf-8")
    files = [link for link in Links(text).found if not link.startswith("data:")]
    assert len(files) == 2 * (3 * 3 + 2)  # a sound and a spectrogram each
    assert all((page.parent / link).is_file() for link in files)
    assert {path.name for path in (page.parent / listening_page.FILES).iterdir()} == {
        Path(link).name for link in files
    }
    assert not re.search(r"https?:|//[a-z]|<!-- ", text)


def test_clips_come_first_in_two_groups_then_means(page):
    text = page.read_text(encoding="utf-8")
    parts = (
        "<dt>fine</dt><dd>one &amp; only</dd>",
        "<h2>Copies of recordings</h2>",
        'data-name="first"',
        "<h2>Speech without a recording</h2>",
        'data-name="tts"',
        "<h2>Means</h2>",
        "<summary>All metrics</summary>",
    )
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)
    assert "mel L1 ↓</th>" in text[positions[-2] : positions[-1]]  # STOI is folded
    assert "STOI ↑</th>" not in text[positions[-2] : positions[-1]]
    assert "STOI ↑</th>" in text[positions[-1] :]


def test_sounds_are_the_files_themselves(page):
    folder = page.parent.parent
    for i, name in enumerate(NAMES, 1):
        copies = [page.parent / listening_page.FILES / f"{i:04}-{k}" for k in range(3)]
        originals = [folder / f"reference/{name}.flac"]
        originals += [folder / f"{system}/{name}_generated.wav" for system in SYSTEMS[1:]]
        for copy, original in zip(copies, originals, strict=True):
            assert copy.with_suffix(original.suffix).read_bytes() == original.read_bytes()


@pytest.mark.parametrize(
    ("name", "kind", "ending"),
    [
        ("a.wav", {"subtype": "DOUBLE"}, ".flac"),
        ("a.aiff", {}, ".flac"),
        ("a.wav", {"subtype": "FLOAT"}, ".wav"),
        ("a.mp3", {}, ".mp3"),
    ],
)
def test_formats_that_browsers_do_not_play_become_flac(tmp_path, name, kind, ending):
    original = write(tmp_path / name, speech_like(0.5), **kind)
    copy = tmp_path / listening_page._copy_sound(str(original), tmp_path / "0001-0")
    assert copy.suffix == ending
    np.testing.assert_allclose(soundfile.read(copy)[0], soundfile.read(original)[0], atol=1e-6)


def test_spectrograms_have_one_scale(tmp_path):
    """One byte for each cell: 0 is silence, 255 is loud speech; low bands are at the bottom."""
    mel = np.array([[-11.5, 2.0, -4.75], [-20.0, 5.0, 2.0]])  # the upper band is the second row
    save_bare_spectrogram(mel, tmp_path / "mel.png")
    with Image.open(tmp_path / "mel.png") as image:
        np.testing.assert_array_equal(image, [[0, 255, 255], [0, 255, 128]])


def test_html_in_names_is_escaped(tmp_path):
    bad = "<img src=x onerror=alert(1)> <!-- clips --> & 'quoted' \"twice\""
    wav = speech_like(1.0)
    write(tmp_path / f"reference/{bad}.wav", wav)
    write(tmp_path / f"{bad}/{bad}.wav", wav)
    text = make_page(tmp_path, generated=(bad,)).read_text(encoding="utf-8")
    assert "<img src=x" not in text and "&lt;img src=x onerror=alert(1)&gt;" in text
    assert text.count("<article") == 1


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("reference", "is part of"),
        ("fine/page", "is part of"),
        (".", None),  # a folder that contains the others is fine
        ("others", "another page"),
        ("file", "cannot be written"),
    ],
)
def test_a_page_that_would_do_harm_is_refused_before_measuring(tmp_path, where, message):
    for name in SYSTEMS:
        write(tmp_path / f"{name}/a.wav", speech_like(0.2))
    (tmp_path / "others").mkdir()
    (tmp_path / "others/index.html").write_text("<p>mine</p>")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    if message is None:
        listening_page.check_page(tmp_path / where, [tmp_path / name for name in SYSTEMS])
    else:
        with pytest.raises(UserError, match=message):
            make_page(tmp_path, "--page", tmp_path / where)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_group_shows_only_the_systems_that_have_clips_in_it(tmp_path):
    write_folders(tmp_path)
    write(tmp_path / "rough/tts_generated_e2e.wav", speech_like(2.0, seed=4))
    text = make_page(tmp_path, "--unpaired").read_text()
    copies, _, others = text.partition("<h2>Speech without a recording</h2>")
    assert 'data-system="fine"' in copies and 'data-system="rough"' in others
    assert 'data-system="fine"' not in others


def test_a_page_replaces_itself_alone_and_names_delays_and_gaps(tmp_path):
    write_folders(tmp_path)
    page = make_page(tmp_path)
    (page.parent / "report.md").write_text("mine")
    assert len([*(page.parent / listening_page.FILES).iterdir()]) == 18
    for path in (tmp_path / "fine").iterdir():
        write(path, np.pad(soundfile.read(path)[0], (128, 0)))
    (tmp_path / "rough/third_generated.wav").unlink()
    text = make_page(tmp_path).read_text(encoding="utf-8")
    assert (page.parent / "report.md").read_text() == "mine"
    assert len([*(page.parent / listening_page.FILES).iterdir()]) == 16
    assert text.count("no such file") == 1 and text.count("<audio") == 8
    assert "The metrics of fine compensate a delay of 128 samples." in text


# --------------------------------------------------------------------------------------- as used


@pytest.fixture(scope="module")
def browser():
    needs_browser()
    with open_browser() as found:
        yield found


@contextmanager
def open_tab(browser, page: Path, **settings):
    """Yields the page, opened from the disk; an error on its console fails the test."""
    troubles = []
    context = browser.new_context(offline=True, **settings)
    tab = context.new_page()
    tab.on("console", lambda message: troubles.append(message.text))
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    tab.goto(page.as_uri())
    yield tab
    context.close()
    assert troubles == []


@pytest.fixture
def tab(browser, page):
    with open_tab(browser, page) as tab:
        # So slow that no clip ends while a busy machine looks at it.
        tab.eval_on_selector_all(
            "audio", "all => all.forEach(a => { a.defaultPlaybackRate = a.playbackRate = 0.1; })"
        )
        yield tab


def order(tab) -> list[str]:
    return tab.eval_on_selector_all(".clip", "clips => clips.map(clip => clip.dataset.name)")


def playing(tab) -> list[tuple[str, str, float]]:
    """Returns clip, system and seconds of each player that is on."""
    return tab.eval_on_selector_all(
        "audio",
        "all => all.filter(a => !a.paused).map(a => [a.closest('.clip').dataset.name, "
        "a.closest('.cell').dataset.system, a.currentTime])",
    )


def wait_for_sound(tab, seconds: float = 0.0) -> None:
    """Waits until a player has reached this time."""
    is_on = f"a => !a.paused && a.currentTime > {seconds}"
    tab.wait_for_function(f"[...document.querySelectorAll('audio')].some({is_on})", timeout=120_000)


def test_clips_of_a_group_are_sorted_by_the_worst(tab):
    assert order(tab) == ["second", "third", "first", "tts"]  # by the first metric
    tab.select_option("#of", "fine")
    assert order(tab) == ["third", "second", "first", "tts"]
    tab.select_option("#sort", "stoi")  # more is better
    values = tab.eval_on_selector_all(
        ".group:first-of-type .cell[data-system=fine]",
        "cells => cells.map(c => JSON.parse(c.dataset.values).stoi)",
    )
    assert values == sorted(values) and values[0] < values[-1]
    tab.select_option("#sort", "")
    assert order(tab) == ["first", "second", "third", "tts"]


def test_best_and_worst_are_marked_and_the_recording_is_first(tab, page):
    results = json.loads((page.parent.parent / "results.json").read_text())
    for clip in results["files"]:
        cells = tab.locator(f".clip[data-name={clip['name']}] .cell")
        assert cells.first.locator(".jump").inner_text().split() == ["0", "recording"]
        for system, mark in (("fine", "best"), ("rough", "worst")):
            cell = tab.locator(f".clip[data-name={clip['name']}] [data-system={system}]")
            value = clip["systems"][system]["values"]["mel_l1"]
            assert f"mel L1 ↓ {mark} {value:#.4g}" in " ".join(cell.inner_text().split())
    assert tab.locator(".clip[data-name=tts] [data-recording]").count() == 0
    means = tab.locator(".shown").first.inner_text()
    facts = results["metrics"]["mel_l1"]["systems"]["fine"]
    assert f"{facts['mean']:#.4g} best" in means
    assert f"({facts['interval'][0]:#.4g} to {facts['interval'][1]:#.4g})" in means
    tab.click(".clip[data-name=first] summary")  # all metrics of the clip
    value = results["files"][0]["systems"]["rough"]["values"]["stoi"]
    assert f"worst {value:#.4g}" in tab.locator(".clip[data-name=first] table").inner_text()


def test_keys_switch_systems_at_the_same_moment_and_walk_from_clip_to_clip(tab):
    tab.keyboard.press("1")
    wait_for_sound(tab)
    assert playing(tab)[0][:2] == ["second", "fine"]
    tab.evaluate("now.currentTime = 1")
    for key, system in (("s", "rough"), ("Shift+S", "fine"), ("0", "reference")):
        tab.keyboard.press(key)
        wait_for_sound(tab)
        (played,) = playing(tab)
        assert played[:2] == ["second", system] and 1 <= played[2] < 1.9
    tab.keyboard.press(" ")
    assert playing(tab) == []
    tab.evaluate("now.currentTime = 1.7")
    tab.keyboard.press("2")  # continues from there
    wait_for_sound(tab)
    (played,) = playing(tab)
    assert played[1] == "rough" and 1.7 <= played[2] < 2
    for key, clip in (("n", "third"), ("p", "second"), ("p", "tts")):
        tab.keyboard.press(key)
        tab.keyboard.press("1")
        wait_for_sound(tab)
        assert [each[0] for each in playing(tab)] == [clip]


def test_keys_that_come_faster_than_the_sound_leave_one_player_on(tab):
    tab.keyboard.press("1")
    wait_for_sound(tab)
    keys = "ssss0ssssss2s"  # of three systems, the last is followed by the first
    played = tab.evaluate(
        """keys => {
            for (const key of keys) document.body.dispatchEvent(
                new KeyboardEvent("keydown", { key, bubbles: true }));
            return [...document.querySelectorAll("audio")].filter(audio => !audio.paused)
                .map(audio => audio.closest(".cell").dataset.system);
        }""",
        keys,
    )
    assert played == ["reference"]  # before any event of a player
    wait_for_sound(tab)
    assert [each[:2] for each in playing(tab)] == [["second", "reference"]]


def test_a_tap_on_a_name_or_a_spectrogram_plays(tab):
    tab.locator(".clip[data-name=first] [data-system=fine] .jump").click()
    wait_for_sound(tab)
    assert [each[:2] for each in playing(tab)] == [["first", "fine"]]
    spectrogram = tab.locator(".clip[data-name=first] [data-system=rough] .picture")
    box = spectrogram.bounding_box()
    spectrogram.click(position={"x": box["width"] * 0.5, "y": 20})
    wait_for_sound(tab, 0.9)
    ((clip, system, seconds),) = playing(tab)
    assert (clip, system) == ("first", "rough") and 0.9 < seconds < 2.0
    line = tab.locator(".clip[data-name=first] [data-system=rough] .picture i").bounding_box()
    assert line["x"] >= box["x"] + 0.45 * box["width"]


def test_blind_votes_are_counted_and_names_come_back(tab):
    names = [*order(tab)]
    tab.click("#blind")
    body = tab.inner_text("body")
    for word in ("fine", "rough", "best ", "mel L1", "noisy"):
        assert word not in body
    cells = tab.locator(".clip[data-name=first] .cell")
    assert cells.first.locator(".jump").inner_text().split() == ["0", "recording"]
    letters = [cells.nth(i).locator(".jump").inner_text().split()[1] for i in (1, 2)]
    assert letters == ["A", "B"]
    assert "closest to the recording" in cells.nth(1).inner_text()
    assert "sounds best" in tab.locator(".clip[data-name=tts] .cell").first.inner_text()
    for name, system in (("first", "fine"), ("second", "fine"), ("tts", "rough")):
        tab.locator(f".clip[data-name={name}] [data-system={system}] input").check()
    tab.locator(".clip[data-name=second] p.vote input").check()  # changed to: cannot tell
    tab.click("#count")
    count = " ".join(tab.inner_text("#votes").split())
    assert "3 of 4 clips voted on: voted for clips fine 1 rough 1 cannot tell 1" in count
    assert order(tab) == names
    systems = tab.eval_on_selector_all(
        ".clip[data-name=first] .jump span", "all => all.map(each => each.textContent)"
    )
    assert systems == ["recording", "fine", "rough"]


def test_blind_orders_differ_from_clip_to_clip(tab):
    """20 shuffles of three clips show both orders, and not always the same in all."""
    seen = set()
    for _ in range(20):
        tab.click("#blind")
        systems = tab.eval_on_selector_all(
            ".cell:nth-child(2)", "cells => cells.map(cell => cell.dataset.system)"
        )
        seen.add(tuple(systems))
        tab.click("#blind")
    assert any(len(set(each)) == 2 for each in seen)  # all alike: once in 8 ** 20
    assert {system for each in seen for system in each} == {"fine", "rough"}


def test_the_keyboard_alone_reaches_everything(tab):
    reached = set()
    for _ in range(60):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("(e => e.id || e.className || e.tagName)(document.activeElement)"))
    assert {"sort", "of", "blind", "jump", "AUDIO", "SUMMARY"} <= reached
    tab.focus("#blind")
    tab.keyboard.press("Enter")
    tab.focus(".clip input")
    tab.keyboard.press(" ")
    tab.focus("#count")
    tab.keyboard.press("Enter")
    assert "1 of 4 clips voted on" in tab.inner_text("#votes")


@pytest.mark.parametrize(
    ("width", "is_wide", "scheme"), [(1400, True, "dark"), (390, False, "light")]
)
def test_it_fits_wide_screens_and_phones(browser, page, width, is_wide, scheme):
    screen = {"viewport": {"width": width, "height": 800}, "has_touch": True}
    with open_tab(browser, page, color_scheme=scheme, **screen) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        first, second = (tab.locator(".cell").nth(i).bounding_box() for i in (0, 1))
        assert (first["y"] == second["y"]) == is_wide
        assert first["y"] < 600  # a player on the first screen
        assert tab.locator(".systems").is_visible() == is_wide
        buttons = tab.locator(".jump").all()
        assert all(button.bounding_box()["height"] >= 40 for button in buttons)
        color = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
        assert (tab.evaluate(color) > 200) == (scheme == "light")
        buttons[1].tap()
        wait_for_sound(tab)


def test_without_scripts_one_can_still_listen(browser, page):
    with open_tab(browser, page, java_script_enabled=False) as tab:
        assert tab.locator("audio").count() == 11
        assert "Without JavaScript" in tab.inner_text("main")


def test_one_system_alone_is_compared_with_the_hidden_recording(browser, tmp_path):
    write_folders(tmp_path)
    with open_tab(browser, make_page(tmp_path, generated=("fine",))) as tab:
        tab.click("#blind")
        assert tab.locator(".clip input").count() == 3 * 3
        assert "recording" not in tab.inner_text(".cells")
        tab.locator(".clip[data-name=first] [data-system=reference] input").check()
        tab.click("#count")
        assert "recording 1" in " ".join(tab.inner_text("#votes").split())
