"""demo/server.py: streams over a WebSocket, and the page in a browser."""

import asyncio
import json
import math
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

from demo import server
from env import UserError
from inference import Streamer, load_generator, synthesize
from tests.browser import needs_browser, open_browser
from tests.conftest import new_checkpoint, random_mel
from tools.toy import run_main

pytest.importorskip("websockets", reason="needs websockets")
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

SIZES = (1, 3, 8, 57)  # frames in a message


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return load_generator(new_checkpoint(tmp_path_factory.mktemp("server")))


@pytest.fixture(scope="module")
def address(generator):
    """Serves a toy generator in a thread; yields host:port."""
    loop, ready = asyncio.new_event_loop(), None
    ready = loop.create_future()
    mel = random_mel(200).T.numpy()
    serving = server.Server(*generator, {"clip1": mel}).serve(0, ready)
    task = loop.create_task(serving)
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])))
    thread.start()
    while not ready.done():
        time.sleep(0.01)
    yield f"127.0.0.1:{ready.result()}"
    loop.call_soon_threadsafe(task.cancel)
    thread.join(10)


def messages(mel: torch.Tensor, sizes: tuple[int, ...] = SIZES) -> list[bytes]:
    """Returns the frames of a mel [num_mels, T] in messages of several sizes."""
    pieces, first = [], 0
    while first < mel.shape[1]:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(mel[:, first : first + size].T.numpy().astype("<f4").tobytes())
        first += size
    return pieces


def exchange(socket, mel: torch.Tensor) -> np.ndarray:
    """Streams a mel and returns the samples in [-1, 1]."""
    for message in messages(mel):
        socket.send(message)
    socket.send("end")
    pcm = b"".join(iter(socket.recv, "end"))
    return np.frombuffer(pcm, "<i2") / 32767


def test_the_first_message_describes_the_stream(address, generator):
    _, h = generator
    with connect(f"ws://{address}/stream") as socket:
        hello = json.loads(socket.recv())
    latency = hello.pop("latency_ms")
    assert hello == {"sampling_rate": 22050, "hop_size": 256, "num_mels": 80}
    streamer, fed, given = Streamer(generator[0]), 0, 0
    while not given:
        fed, given = fed + h.hop_size, len(streamer.feed(torch.zeros(80, 1)))
    frames = math.ceil((fed - given) / h.hop_size)  # part of a frame may be final before the rest
    assert latency == pytest.approx(1000 * frames * h.hop_size / h.sampling_rate)


def test_two_clients_at_once_get_the_samples_of_their_own_mels(address, generator):
    mels = [random_mel(300), random_mel(411)]
    wavs = [None, None]

    def client(i: int) -> None:
        with connect(f"ws://{address}/stream") as socket:
            socket.recv()
            exchange(socket, random_mel(50))  # "end" begins a new stream
            wavs[i] = exchange(socket, mels[i])

    threads = [threading.Thread(target=client, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for mel, wav in zip(mels, wavs, strict=True):
        expected = synthesize(generator[0], mel).clamp(-1, 1).numpy()
        np.testing.assert_allclose(wav, expected, atol=1 / 32767)


def test_samples_arrive_before_the_mel_ends(address, generator):
    with connect(f"ws://{address}/stream") as socket:
        frames = json.loads(socket.recv())["latency_ms"] * 22.05 / 256
        for message in messages(random_mel(round(frames) + 1), sizes=(1,)):
            socket.send(message)
        received = 0
        while received < 2 * 256:
            received += len(socket.recv(timeout=10))


def test_a_minute_in_small_messages_arrives_whole(address, generator):
    _, h = generator
    frames, received = round(60 * h.sampling_rate / h.hop_size), 0
    with connect(f"ws://{address}/stream") as socket:
        socket.recv()
        sender = threading.Thread(
            target=lambda: [
                *map(socket.send, messages(random_mel(frames), (8,))),
                socket.send("end"),
            ]
        )
        sender.start()
        for pcm in iter(socket.recv, "end"):
            received += len(pcm) // 2
        sender.join()
    assert received == frames * h.hop_size


NAN = np.full(80, np.nan, dtype="<f4").tobytes()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"123", "frames of 320 bytes, not 3 bytes"),
        (b"", "not 0 bytes"),
        ("stop", "not other text"),
        (NAN, "NaN or infinity"),
    ],
)
def test_an_invalid_message_ends_its_connection_only(address, message, reason):
    with connect(f"ws://{address}/stream") as good, connect(f"ws://{address}/stream") as bad:
        good.recv()
        bad.recv()
        bad.send(message)
        with pytest.raises(ConnectionClosedError, match=reason):
            bad.recv(timeout=10)
        assert len(exchange(good, random_mel(9))) == 9 * 256


def test_pages_of_other_sites_are_refused(address):
    with pytest.raises(InvalidStatus, match="403"):
        connect(f"ws://{address}/stream", origin="http://example.com")
    with connect(f"ws://{address}/stream", origin=f"http://{address}") as socket:
        socket.recv()


def test_the_page_and_the_clips_are_served(address):
    def get(path: str) -> bytes:
        with urllib.request.urlopen(f"http://{address}{path}") as response:
            return response.read()

    assert b"<title>MISRNet: streaming</title>" in get("/")
    assert json.loads(get("/clips")) == ["clip1"]
    assert len(get("/clips/clip1")) == 200 * 320
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get("/clips/../../env.py")


def test_pending_messages_are_taken_together_up_to_the_end():
    async def take() -> list:
        queue = asyncio.Queue()
        for message in (b"1", b"2", "end", b"3", None):
            queue.put_nowait(message)
        return [await server.take_pending(queue) for _ in range(2)]

    assert asyncio.run(take()) == [[b"1", b"2", "end"], [b"3", None]]


def test_a_port_in_use_is_one_line(address, generator):
    port = int(address.rpartition(":")[2])
    with pytest.raises(UserError, match=f"{port}: .*; pass another --port"):
        asyncio.run(server.Server(*generator).serve(port))


def test_a_port_above_65535_is_refused(capsys):
    with pytest.raises(SystemExit):
        run_main(server, "--checkpoint_file", "g_00000001", "--port", 99999)
    assert "expected a port from 0 to 65535, not 99999" in capsys.readouterr().err


def test_the_page_plays_a_clip_and_a_file_by_keyboard(address, tmp_path):
    needs_browser()
    np.save(tmp_path / "mel.npy", random_mel(120).numpy())
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 360, "height": 740})
        errors = []
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(f"http://{address}/")
        page.wait_for_selector("#status:text('Ready')")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.focus("#start")
        page.keyboard.press("Enter")
        page.wait_for_selector("#status:text('Done')", timeout=30_000)
        assert 0 < int(page.inner_text("#first").removesuffix(" ms")) < 10_000
        assert page.inner_text("#received") == "2.3 s of 2.3 s"
        page.check("[value=fast]")
        page.set_input_files("#file", tmp_path / "mel.npy")
        page.click("#start")
        page.wait_for_selector("#status:text('Playing')")
        page.wait_for_selector("#status:text('Done')", timeout=30_000)
        assert page.inner_text("#received") == "1.4 s of 1.4 s"
        assert page.inner_text("#gaps").endswith(" ms)")
        assert errors == []
