"""The listening page, as written and, where there is a Chromium, as a person uses it."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import evaluate
from env import UserError
from evaluation import page as listen
from evaluation.metrics import METRICS
from evaluation.plots import save_bare_spectrogram
from tests.browser import needs_browser, open_browser
from tools.toy import run_main, speech_like

RATE = 22050
SYSTEMS = ("reference", "fine", "rough")
NAMES = ("first", "second", "third")
# Noise, of full scale: the second clip is the worst of "rough", the third of "fine".
NOISE = {"fine": (0.001, 0.002, 0.008), "rough": (0.02, 0.08, 0.04)}


def write(path: Path, wav: np.ndarray, **kind) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, RATE, **kind)
    return path


def write_folders(folder: Path) -> list[Path]:
    """reference, fine and rough: three clips each, but the third of rough is missing a file."""
    noise = np.random.default_rng(0).standard_normal(3 * RATE)
    for i, name in enumerate(NAMES):
        wav = speech_like(2.0, seed=i)
        write(folder / f"reference/{name}.flac", wav)
        for system, amounts in NOISE.items():
            write(folder / system / f"{name}_generated.wav", wav + amounts[i] * noise[: len(wav)])
    return [folder / name for name in SYSTEMS]


def make_page(folder: Path, *flags, generated: tuple[str, ...] = SYSTEMS[1:]) -> Path:
    """Runs evaluate.py on the folders in `folder`; returns index.html."""
    given = ("--reference_dir", folder / "reference")
    given += ("--generated_dir", *(folder / name for name in generated))
    flags = flags or ("--page", folder / "page")
    assert run_main(evaluate, *given, "--workers", 1, *flags) == 0
    return Path(flags[1]) / "index.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_folders(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "METRICS", [m for m in METRICS if m.name in ("mel_l1", "stoi")])
        return make_page(folder, "--page", folder / "page", "--output", folder / "results.json")


@pytest.fixture
def two_metrics(monkeypatch):
    chosen = [metric for metric in METRICS if metric.name in ("mel_l1", "stoi")]
    monkeypatch.setattr(evaluate, "METRICS", chosen)


class Links(HTMLParser):
    """What a page loads."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href")]


# --- as written


def test_every_file_of_the_page_is_there_and_none_is_elsewhere(page):
    links = Links(page.read_text(encoding="utf-8")).found
    files = [link for link in links if not link.startswith("data:")]
    assert len(files) == 2 * 9  # a sound and a picture each
    assert all((page.parent / link).is_file() for link in files)
    assert {path.name for path in (page.parent / listen.FILES).iterdir()} == {
        Path(link).name for link in files
    }
    assert not re.search(r"https?:|//[a-z]", page.read_text(encoding="utf-8"))


def test_sounds_are_the_files_themselves(page):
    folder = page.parent.parent
    for i, name in enumerate(NAMES, 1):
        copies = [page.parent / listen.FILES / f"{i:04}-{k}" for k in range(3)]
        originals = [folder / f"reference/{name}.flac"]
        originals += [folder / f"{system}/{name}_generated.wav" for system in SYSTEMS[1:]]
        for copy, original in zip(copies, originals, strict=True):
            copied = copy.with_suffix(original.suffix)
            assert copied.read_bytes() == original.read_bytes()


@pytest.mark.parametrize(
    ("name", "kind", "ending"),
    [
        ("a.wav", {"subtype": "DOUBLE"}, ".flac"),
        ("a.aiff", {}, ".flac"),
        ("a.wav", {"subtype": "FLOAT"}, ".wav"),
        ("a.flac", {}, ".flac"),
        ("a.mp3", {}, ".mp3"),
    ],
)
def test_what_browsers_do_not_play_becomes_flac(tmp_path, name, kind, ending):
    original = write(tmp_path / name, speech_like(0.5), **kind)
    copy = tmp_path / listen._copy_sound(str(original), tmp_path / "0001-0")
    assert copy.suffix == ending
    expected, _ = soundfile.read(original)
    np.testing.assert_allclose(soundfile.read(copy)[0], expected, atol=1e-6)


def test_pictures_are_of_one_scale(tmp_path):
    """A byte a cell, silence 0 and loud speech 255 in every picture, low bands at the bottom."""
    mel = np.array([[-11.5, 2.0, -4.75], [-20.0, 5.0, 2.0]])  # the upper band is the second row
    save_bare_spectrogram(mel, tmp_path / "mel.png")
    with Image.open(tmp_path / "mel.png") as image:
        np.testing.assert_array_equal(image, [[0, 255, 255], [0, 255, 128]])


def test_names_are_shown_not_obeyed(tmp_path, two_metrics):
    """Names of files and folders that are HTML, and no text."""
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
        (".", None),  # a folder that holds the others is no trouble
        ("others", "another page"),
        ("reference/first.flac", "is part of"),
        ("file", "cannot be written"),
    ],
)
def test_a_page_goes_nowhere_where_it_would_harm(tmp_path, where, message, two_metrics):
    """And says so before anything is measured."""
    folders = write_folders(tmp_path)
    (tmp_path / "others").mkdir()
    (tmp_path / "others/index.html").write_text("<p>mine</p>")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    if message is None:
        listen.check_page(tmp_path / where, folders)
    else:
        with pytest.raises(UserError, match=message):
            make_page(tmp_path, "--page", tmp_path / where)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_is_written_over_itself_and_keeps_what_else_is_there(tmp_path, two_metrics):
    write_folders(tmp_path)
    page = make_page(tmp_path)
    (page.parent / "report.md").write_text("mine")
    old = {path.name for path in (page.parent / listen.FILES).iterdir()}
    make_page(tmp_path, generated=("fine",))
    new = {path.name for path in (page.parent / listen.FILES).iterdir()}
    assert (page.parent / "report.md").read_text() == "mine"
    assert len(old) == 18 and len(new) == 12
    assert page.read_text(encoding="utf-8").count('data-system="rough"') == 0


def test_a_clip_that_one_system_lacks_has_an_empty_cell(tmp_path, two_metrics):
    write_folders(tmp_path)
    (tmp_path / "rough/third_generated.wav").unlink()
    text = make_page(tmp_path).read_text(encoding="utf-8")
    assert text.count("no such file") == 1 and text.count("<audio") == 8


def test_the_page_says_that_a_delay_was_made_up_for(tmp_path, two_metrics):
    write_folders(tmp_path)
    for path in (tmp_path / "fine").iterdir():
        wav, _ = soundfile.read(path)
        write(path, np.pad(wav, (128, 0)))
    text = make_page(tmp_path, generated=("fine",)).read_text(encoding="utf-8")
    assert "fine: a delay of 128 samples was made up for" in text


# --- as used


@pytest.fixture(scope="module")
def browser():
    needs_browser()
    with open_browser() as found:
        yield found


@pytest.fixture
def tab(browser, page):
    """The page, open from the disk; ends in an error where its console had one."""
    troubles = []
    context = browser.new_context(offline=True, color_scheme="light")
    tab = context.new_page()
    tab.on("console", lambda message: troubles.append(message.text))
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    tab.goto(page.as_uri())
    # So slow that no clip ends while a busy machine looks at it.
    tab.eval_on_selector_all(
        "audio", "all => all.forEach(a => { a.defaultPlaybackRate = a.playbackRate = 0.1; })"
    )
    yield tab
    context.close()
    assert troubles == []


def order(tab) -> list[str]:
    return tab.eval_on_selector_all(".clip", "clips => clips.map(clip => clip.dataset.name)")


def playing(tab) -> list[tuple[str, str, float]]:
    """(clip, system, seconds) of each player that is on."""
    return tab.eval_on_selector_all(
        "audio",
        "all => all.filter(a => !a.paused).map(a => [a.closest('.clip').dataset.name, "
        "a.closest('.cell').dataset.system, a.currentTime])",
    )


def wait_for_sound(tab, seconds: float = 0.0) -> None:
    """Until a player has come so far."""
    tab.wait_for_function(
        f"[...document.querySelectorAll('audio')].some(a => !a.paused && a.currentTime > {seconds})"
    )


def test_clips_are_in_the_order_of_the_worst(tab):
    assert order(tab) == ["second", "third", "first"]  # by the first metric, the worst system's
    tab.select_option("#of", "fine")
    assert order(tab) == ["third", "second", "first"]
    tab.select_option("#sort", "stoi")  # of which more is better
    values = tab.eval_on_selector_all(
        ".cell[data-system=fine]", "cells => cells.map(c => JSON.parse(c.dataset.values).stoi)"
    )
    assert values == sorted(values) and values[0] < values[-1]
    tab.select_option("#sort", "")
    assert order(tab) == ["first", "second", "third"]


def test_best_and_worst_are_marked_and_the_recording_is_first(tab, page):
    report = json.loads((page.parent.parent / "results.json").read_text())
    for clip in report["files"]:
        cells = tab.locator(f".clip[data-name={clip['name']}] .cell")
        assert cells.first.get_attribute("data-system") == "reference"
        for system, mark in (("fine", "best"), ("rough", "worst")):
            cell = tab.locator(f".clip[data-name={clip['name']}] [data-system={system}]")
            value = clip["systems"][system]["values"]["mel_l1"]
            assert f"{mark} {value:#.4g}" in " ".join(cell.inner_text().split())
    table = tab.locator("table").first.inner_text()
    facts = report["metrics"]["mel_l1"]["systems"]["fine"]
    assert f"{facts['mean']:#.4g} best" in table
    assert f"({facts['interval'][0]:#.4g} to {facts['interval'][1]:#.4g})" in table


def test_one_key_jumps_between_systems_at_the_same_moment(tab):
    tab.keyboard.press("1")
    wait_for_sound(tab)
    assert playing(tab)[0][:2] == ["second", "fine"]
    tab.evaluate("now.currentTime = 1")
    for key, system in (("s", "rough"), ("Shift+S", "fine"), ("0", "reference")):
        tab.keyboard.press(key)
        wait_for_sound(tab)
        (heard,) = playing(tab)
        assert heard[:2] == ["second", system] and 1 <= heard[2] < 1.9
    tab.keyboard.press(" ")
    assert playing(tab) == []
    tab.evaluate("now.currentTime = 1.7")
    tab.keyboard.press("2")  # goes on from there
    wait_for_sound(tab)
    (heard,) = playing(tab)
    assert heard[1] == "rough" and 1.7 <= heard[2] < 2


def test_keys_that_come_faster_than_the_sound_leave_one_player_on(tab):
    tab.keyboard.press("1")
    wait_for_sound(tab)
    keys = "ssss0ssssss2s"  # of three systems, the last is followed by the first
    heard = tab.evaluate(
        """keys => {
            for (const key of keys) document.body.dispatchEvent(
                new KeyboardEvent("keydown", { key, bubbles: true }));
            return [...document.querySelectorAll("audio")].filter(audio => !audio.paused)
                .map(audio => audio.closest(".cell").dataset.system);
        }""",
        keys,
    )
    assert heard == ["reference"]  # before any event of a player
    wait_for_sound(tab)
    assert [each[:2] for each in playing(tab)] == [["second", "reference"]]


def test_keys_walk_from_clip_to_clip(tab):
    tab.keyboard.press("n")
    tab.keyboard.press("2")
    wait_for_sound(tab)
    assert playing(tab)[0][:2] == ["third", "rough"]
    tab.keyboard.press("p")
    tab.keyboard.press("2")
    wait_for_sound(tab)
    assert [each[:2] for each in playing(tab)] == [["second", "rough"]]


def test_a_tap_on_a_name_or_a_spectrogram_plays(tab):
    tab.locator(".clip[data-name=first] [data-system=fine] .jump").click()
    wait_for_sound(tab)
    assert [each[:2] for each in playing(tab)] == [["first", "fine"]]
    picture = tab.locator(".clip[data-name=first] [data-system=rough] .picture")
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] * 0.5, "y": 20})
    wait_for_sound(tab, 0.9)
    ((clip, system, seconds),) = playing(tab)
    assert (clip, system) == ("first", "rough") and 0.9 < seconds < 2.0
    line = tab.locator(".clip[data-name=first] [data-system=rough] .picture i").bounding_box()
    assert line["x"] >= box["x"] + 0.45 * box["width"]


def test_blind_votes_are_counted_and_names_come_back(tab):
    names = [*order(tab)]
    tab.click("#blind")
    body = tab.inner_text("main")
    for word in ("fine", "rough", "best", "mel_l1"):
        assert word not in body
    cells = tab.locator(".clip[data-name=first] .cell")
    assert cells.first.locator(".jump").inner_text().split() == ["0", "reference"]
    letters = [cells.nth(i).locator(".jump").inner_text().split()[1] for i in (1, 2)]
    assert letters == ["A", "B"]
    for name, system in (("first", "fine"), ("second", "fine"), ("third", "rough")):
        tab.locator(f".clip[data-name={name}] [data-system={system}] input").check()
    tab.locator(".clip[data-name=second] p.vote input").check()  # of a mind: cannot tell
    tab.click("#count")
    count = " ".join(tab.inner_text("#votes").split())
    assert "3 of 3 clips voted on: voted for clips fine 1 rough 1 cannot tell 1" in count
    assert order(tab) == names
    systems = tab.eval_on_selector_all(
        ".clip:first-child .jump span", "all => all.map(each => each.textContent)"
    )
    assert systems == [*SYSTEMS]


def test_blind_orders_differ_from_clip_to_clip(tab):
    """Over 20 shuffles of three clips, both orders are seen, and not always the same in all."""
    seen = set()
    for _ in range(20):
        tab.click("#blind")
        seen.add(
            tuple(
                tab.eval_on_selector_all(
                    ".cell:nth-child(2)", "cells => cells.map(cell => cell.dataset.system)"
                )
            )
        )
        tab.click("#blind")
    assert any(len(set(each)) == 2 for each in seen)  # all alike: once in 4 ** 20
    assert {system for each in seen for system in each} == {"fine", "rough"}


def test_the_keyboard_alone_reaches_everything(tab):
    """Tab by Tab, in the order of the page; what has the focus can be seen."""
    reached = set()
    for _ in range(80):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("(e => e.id || e.className || e.tagName)(document.activeElement)"))
    assert {"sort", "of", "blind", "jump", "AUDIO", "SUMMARY"} <= reached
    tab.focus("#blind")
    tab.keyboard.press("Enter")
    tab.focus(".clip input")
    tab.keyboard.press(" ")
    tab.focus("#count")
    tab.keyboard.press("Enter")
    assert "1 of 3 clips voted on" in tab.inner_text("#votes")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "side_by_side"), [(1400, True), (390, False)])
def test_it_fits_wide_screens_and_phones(browser, page, scheme, width, side_by_side):
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, has_touch=True
    )
    tab = context.new_page()
    tab.goto(page.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    first, second = (tab.locator(".cell").nth(i).bounding_box() for i in (0, 1))
    assert (first["y"] == second["y"]) == side_by_side
    buttons = tab.locator(".jump").all()
    assert all(button.bounding_box()["height"] >= 40 for button in buttons)
    brightness = tab.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    )
    assert (brightness > 200) == (scheme == "light")
    buttons[1].tap()
    wait_for_sound(tab)
    context.close()


def test_without_scripts_one_can_still_listen(browser, page):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(page.as_uri())
    assert tab.locator("audio").count() == 9
    assert "Without JavaScript" in tab.inner_text("main")
    context.close()


@pytest.mark.usefixtures("two_metrics")
def test_one_system_alone_is_held_against_the_hidden_recording(browser, tmp_path):
    write_folders(tmp_path)
    shutil.rmtree(tmp_path / "rough")
    context = browser.new_context()
    tab = context.new_page()
    tab.goto(make_page(tmp_path, generated=("fine",)).as_uri())
    tab.click("#blind")
    assert tab.locator(".clip input").count() == 3 * 3
    assert "reference" not in tab.inner_text("#clips")
    tab.locator(".clip[data-name=first] [data-system=reference] input").check()
    tab.click("#count")
    assert "reference 1" in " ".join(tab.inner_text("#votes").split())
    context.close()
