"""Streams speech over a WebSocket: mel frames in, samples out as soon as they are final.

    pip install -r requirements.txt -r requirements-app.txt
    python demo/server.py --checkpoint_file pretrained/frame_v2_universal/g_*

http://127.0.0.1:8765 serves a page that streams clips and plays them; ws://127.0.0.1:8765/stream is
the WebSocket. The server listens on this machine only. The protocol:

    server -> client   text     JSON: sampling_rate, hop_size, num_mels, latency_ms (algorithmic)
    client -> server   binary   one or more log-mel frames, float32, little-endian, [num_mels] each
    server -> client   binary   samples, 16-bit PCM, little-endian, mono
    client -> server   text     "end": the mel has ended
    server -> client            the remaining samples, then the text "end"; a new mel may follow

A message of another kind, or NaN, ends its connection with a reason.
"""

import argparse
import asyncio
import contextlib
import http
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts
from audio import load_wav, to_pcm16
from distributed import select_device, speed_up_cpu
from env import Config, UserError
from inference import Streamer, load_generator
from meldataset import LogMelSpectrogram
from models import Generator
from utils import command_line, command_parser, natural, say

ROOT = Path(__file__).parents[1]
CLIPS = sorted(ROOT.glob("pretrained/samples/**/*.flac"))[:4]  # recordings
PAGE = Path(__file__).with_name("server.html")
HOST = "127.0.0.1"
OWN_HOSTS = (HOST, "localhost", None)  # of pages that may open the WebSocket; None: no page
QUEUED_MESSAGES = 256  # of a connection; a client that sends faster must wait
INVALID_DATA = 1007  # WebSocket close code, RFC 6455, section 7.4.1


class ClientError(Exception):
    """A message that the protocol does not allow."""


@dataclass
class Server:
    """One generator for all connections, each of which has its own Streamer.

    The generator runs in one worker thread, so that the event loop stays free. The thread processes
    the messages of all connections one after the other.
    """

    generator: Generator
    h: Config
    clips: dict[str, np.ndarray] = field(default_factory=dict)  # frames [T, num_mels] by name
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))

    def __post_init__(self) -> None:
        latency = Streamer(self.generator).latency * self.h.hop_size  # samples
        self.hello = {
            "sampling_rate": self.h.sampling_rate,
            "hop_size": self.h.hop_size,
            "num_mels": self.h.num_mels,
            "latency_ms": 1000 * latency / self.h.sampling_rate,
        }

    async def handle(self, connection) -> None:
        """Serves one connection until either side closes it."""
        from websockets.exceptions import ConnectionClosed

        streamer, loop = Streamer(self.generator), asyncio.get_running_loop()
        queue = asyncio.Queue(maxsize=QUEUED_MESSAGES)
        reader = loop.create_task(read(connection, queue))
        try:
            await connection.send(json.dumps(self.hello))
            while (messages := await take_pending(queue)) and messages[-1] is not None:
                pcm = await loop.run_in_executor(self.worker, answer, streamer, messages)
                if pcm:
                    await connection.send(pcm)
                if messages[-1] == "end":
                    await connection.send("end")
        except ClientError as error:
            await connection.close(INVALID_DATA, str(error))
        except ConnectionClosed:
            pass
        finally:
            reader.cancel()

    def respond(self, connection, request):
        """Returns the HTTP response for the page and its clips, None for the WebSocket."""
        from websockets.datastructures import Headers
        from websockets.http11 import Response

        def response(status: http.HTTPStatus, kind: str, body: bytes) -> Response:
            headers = Headers({"Content-Type": kind, "Content-Length": str(len(body))})
            return Response(status.value, status.phrase, headers, body)

        path = request.path.partition("?")[0]
        name = path.removeprefix("/clips/")
        if path == "/stream":
            origin = request.headers.get("Origin", "")
            is_allowed = urlsplit(origin).hostname in OWN_HOSTS and origin != "null"
            return None if is_allowed else response(http.HTTPStatus.FORBIDDEN, "text/plain", b"")
        if path == "/":
            return response(http.HTTPStatus.OK, "text/html; charset=utf-8", PAGE.read_bytes())
        if path == "/clips":
            return response(
                http.HTTPStatus.OK, "application/json", json.dumps([*self.clips]).encode()
            )
        if name in self.clips:
            body = self.clips[name].astype("<f4").tobytes()
            return response(http.HTTPStatus.OK, "application/octet-stream", body)
        return response(http.HTTPStatus.NOT_FOUND, "text/plain", b"not found\n")

    async def serve(self, port: int, ready: asyncio.Future | None = None) -> None:
        """Serves until it is cancelled; sets the result of `ready` to the port.

        Raises:
            UserError: the port is in use.
        """
        from websockets.asyncio.server import serve

        try:
            server = await serve(
                self.handle, HOST, port, process_request=self.respond, compression=None
            )
        except OSError as error:
            raise UserError(f"{HOST}:{port}: {error.strerror}; pass another --port") from None
        async with server:
            port = next(iter(server.sockets)).getsockname()[1]
            say(f"open http://{HOST}:{port} in a browser; Ctrl-C ends")
            if ready:
                ready.set_result(port)
            await server.serve_forever()


async def read(connection, queue: asyncio.Queue) -> None:
    """Puts the messages of a connection into `queue`, and None when it is closed."""
    from websockets.exceptions import ConnectionClosed

    with contextlib.suppress(ConnectionClosed):
        async for message in connection:
            await queue.put(message)
    await queue.put(None)


async def take_pending(queue: asyncio.Queue) -> list[str | bytes | None]:
    """Waits for a message; returns it with all that follow it already, up to an "end" or None.

    A server that falls behind catches up, because many frames at a time are faster than one by one.
    """
    messages = [await queue.get()]
    while messages[-1] not in ("end", None) and not queue.empty():
        messages.append(queue.get_nowait())
    return messages


def answer(streamer: Streamer, messages: list[str | bytes]) -> bytes:
    """Returns the 16-bit PCM samples that become final with a client's messages.

    Raises:
        ClientError: another text than "end", no whole frames, or values that are not finite.
    """
    num_mels = streamer.generator.conv_pre.in_channels
    pieces = [to_frames(message, num_mels) for message in messages if message != "end"]
    mel = torch.from_numpy(np.concatenate([np.zeros((0, num_mels), np.float32), *pieces]).T)
    try:
        return to_pcm16(streamer.flush(mel) if messages[-1] == "end" else streamer.feed(mel))
    except ValueError as error:
        raise ClientError(str(error)) from None


def to_frames(message: str | bytes, num_mels: int) -> np.ndarray:
    """Returns the frames [n, num_mels] of a binary message.

    Raises:
        ClientError: text, or no whole number of frames.
    """
    if isinstance(message, str) or not message or len(message) % (4 * num_mels):
        size = f"{len(message)} bytes" if isinstance(message, bytes) else "other text"
        raise ClientError(f'expected "end" or float32 frames of {4 * num_mels} bytes, not {size}')
    return np.frombuffer(message, "<f4").reshape(-1, num_mels).astype(np.float32)


def load_clips(paths: list[Path], h: Config) -> dict[str, np.ndarray]:
    """Returns the log-mels [T, num_mels] of audio files by name."""
    log_mel = LogMelSpectrogram(h, h.fmax)
    wavs = [load_wav(path, h.sampling_rate, min_samples=h.hop_size) for path in paths]
    return {f"clip{i}": log_mel(wav[None])[0].T.numpy() for i, wav in enumerate(wavs, start=1)}


def main() -> None:
    """Serves until Ctrl-C.

    Raises:
        UserError: websockets is missing, the checkpoint cannot be used, or the port is in use.
    """
    parser = command_parser(
        "Streams speech over a WebSocket, on this machine only, and serves a page that plays it.",
        example="python demo/server.py --checkpoint_file pretrained/frame_v2_universal/g_*",
    )
    parser.add_argument(
        "--checkpoint_file",
        metavar="FILE",
        required=True,
        help="the generator, g_*, with its config.json beside it",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    parser.add_argument(
        "--port", type=port, default=8765, metavar="N", help="port; 0: any free one"
    )
    a = parser.parse_args()
    try:
        import websockets  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}; run: pip install -r requirements-app.txt") from None
    device = select_device(a.device)
    if device.type == "cpu":
        speed_up_cpu()
    generator, h = load_generator(a.checkpoint_file, device)
    asyncio.run(Server(generator, h, load_clips(CLIPS, h)).serve(a.port))


def port(text: str) -> int:
    """Returns a port number given on the command line."""
    if natural(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, not {text}")
    return int(text)


if __name__ == "__main__":
    command_line(main)
