"""A generator as a graph with explicit state: n frames of mel in, n * hop_size samples out.

The samples equal those of `streaming.Streamer`, later by a fixed number of samples. Every layer
processes as many positions in each piece. Positions before the mel's first frame and after its last
one are set to zero at the input of each convolution, as its padding does for the whole mel.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from harmonic import HarmonicNoiseHead
from harmonic_stream import GRIFFIN_LIM_LOOKAHEAD, stream_steps
from models import POST_LRELU_SLOPE, Generator, ISTFTHead
from onnx_graph import (
    LRELU_SLOPE,
    SCALE,
    GraphGenerator,
    ResidualUnits,
    Stage,
    TimeConv,
    WithMagnitude,
    extrapolate,
)

UNKNOWN = 2**40  # frames, as the length of a mel that has not ended


class Piece(NamedTuple):
    """A piece x [1, C, rows, n * rate] of a signal that has `rate` positions for each frame.

    x lies `delay` positions behind the mel. The signal has `extra` positions after the last frame.
    """

    x: torch.Tensor
    rate: int = 1
    delay: int = 0
    extra: int = 0


class State:
    """The tensors that a stream keeps between two pieces, in the order in which they are used."""

    def __init__(self, tensors: tuple[torch.Tensor, ...] | None = None):
        self.tensors, self.names, self.next = tensors, [], []

    def read(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns a tensor of the state, initially zero; `write` must follow."""
        self.names.append(name)
        if self.tensors is None:
            return torch.zeros(shape, dtype=dtype)
        return self.tensors[len(self.names) - 1]

    def write(self, tensor: torch.Tensor) -> None:
        """Replaces the tensor that was read last."""
        self.next.append(tensor)

    def with_past(self, name: str, x: torch.Tensor, size: int) -> torch.Tensor:
        """Puts the `size` positions before x [..., n] in front of it, [..., size + n]."""
        if size == 0:
            return x
        x = torch.cat([self.read(name, *x.shape[:-1], size, dtype=x.dtype), x], dim=-1)
        self.write(x[..., x.shape[-1] - size :])
        return x

    def delayed(self, name: str, x: torch.Tensor, size: int) -> torch.Tensor:
        """Returns the n positions that precede the last `size` ones of x [..., n] and its past."""
        return self.with_past(name, x, size)[..., : x.shape[-1]]


class Clock:
    """Tells which positions of a piece belong to the mel.

    `frames` [1] is the number of frames before the piece, `length` [1] that of the whole mel, or 0
    as long as it is unknown. The piece has n frames.
    """

    def __init__(self, frames: torch.Tensor, length: torch.Tensor, n: int):
        self.frames, self.n, self.masks = frames, n, {}
        self.length = torch.where(length == 0, UNKNOWN, length)

    def positions(self, rate: int, delay: int) -> torch.Tensor:
        """Returns the positions [n * rate] of a piece."""
        return self.frames * rate - delay + torch.arange(self.n * rate)

    def is_valid(self, positions: torch.Tensor, rate: int = 1, extra: int = 0) -> torch.Tensor:
        """Returns 1 where a position lies in the signal, and 0 elsewhere."""
        return ((positions >= 0) & (positions < self.length * rate + extra)).float()

    def mask(self, piece: Piece) -> torch.Tensor:
        """Returns 1 for positions of the signal and 0 for others, [rows, n * rate].

        Of all rows, because ONNX Runtime is slow to repeat short rows.
        """
        key = piece.x.shape[2], *piece[1:]
        if key not in self.masks:
            positions = self.positions(piece.rate, piece.delay)
            mask = self.is_valid(positions, piece.rate, piece.extra)
            self.masks[key] = mask.expand(piece.x.shape[2], -1)
        return self.masks[key]


class StreamGenerator(nn.Module):
    """A Generator for pieces of `frames` frames.

    forward(mel [1, num_mels, frames], *state) -> (wav [1, 1, frames * hop_size], *next_state). The
    state is zero at first. Its second tensor, `length`, stays zero until the mel's number of frames
    is known; it must be set before the piece that holds the last frame, or the first piece of
    silence after it.
    """

    def __init__(self, generator: Generator, h, frames: int):
        super().__init__()
        self.graph, self.frames = GraphGenerator(generator), frames
        self.pads = isinstance(generator.pad_post, nn.ReflectionPad1d)
        self.head = None
        if isinstance(generator.head, HarmonicNoiseHead):
            self.head = self.harmonic_stream(self.graph.head)
        state = State()
        with torch.no_grad():
            wav = self.run(torch.zeros(1, h.num_mels, frames), state)
        self.state_names, self.latency_samples = state.names, wav.delay
        self.initial_state = tuple(torch.zeros_like(tensor) for tensor in state.next)

    def harmonic_stream(self, head) -> "HarmonicStream":
        """Returns the stream of a frame-rate head."""
        return HarmonicStream(head)

    def forward(self, mel: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = State(tensors)
        return (self.run(mel, state).x, *state.next)

    def run(self, mel: torch.Tensor, state: State) -> Piece:
        """Returns the piece of the waveform, [1, 1, N], and replaces the state."""
        frames = state.read("frames", 1, dtype=torch.int64)
        state.write(frames + self.frames)
        length = state.read("length", 1, dtype=torch.int64)
        state.write(length * 1)
        clock, graph = Clock(frames, length, self.frames), self.graph
        x = mel if graph.min_log_mel is None else mel.clamp(min=graph.min_log_mel)
        x = convolve(Piece(x.unsqueeze(2)), graph.conv_pre, state, clock, "conv_pre")
        for i, stage in enumerate(graph.stages):
            x = run_stage(map_piece(x, LRELU_SLOPE), stage, state, clock, f"stages.{i}")
        x = map_piece(x, POST_LRELU_SLOPE)
        if self.pads:
            x = reflect_start(x, state, clock)
        x = convolve(x, graph.conv_post, state, clock, "conv_post")
        if self.head is not None:
            return self.head(x, mel, state, clock)
        if isinstance(graph.head, ISTFTHead):
            return run_istft(x, graph.head, state, clock)
        return x._replace(x=torch.tanh(x.x)[:, :, 0])


def map_piece(piece: Piece, slope: float) -> Piece:
    """Applies a leaky ReLU."""
    return piece._replace(x=F.leaky_relu(piece.x, slope))


def convolve(piece: Piece, conv: TimeConv, state: State, clock: Clock, name: str) -> Piece:
    """Applies a convolution that keeps the length."""
    context = conv.before + conv.after
    x = piece.x
    if context > 0:
        x = state.with_past(name, x * clock.mask(piece), context)
    return piece._replace(x=conv.convolve(x), delay=piece.delay + conv.after)


def residual(piece: Piece, block: ResidualUnits, state: State, clock: Clock, name: str) -> Piece:
    """Applies the residual units of a block."""
    for i, unit in enumerate(block.units):
        y = piece
        for j, conv in enumerate(unit):
            y = convolve(map_piece(y, LRELU_SLOPE), conv, state, clock, f"{name}.{i}.{j}")
        x = state.delayed(f"{name}.{i}.input", piece.x, y.delay - piece.delay)
        piece = y._replace(x=x + y.x)
    return piece


def run_stage(piece: Piece, stage: Stage, state: State, clock: Clock, name: str) -> Piece:
    """Applies a stage of the generator, upsampling and a fusion block."""
    if stage.up is not None:
        up = stage.up
        piece = upsample(
            piece, up.weight, state, clock, f"{name}.up", rate=up.stride[0], padding=up.padding[0]
        )
        piece = piece._replace(x=piece.x + up.bias[:, None, None])
    if stage.misr is not None:
        misr = stage.misr
        piece = piece._replace(x=misr.input(piece.x))
        piece = residual(piece, misr.resblock, state, clock, f"{name}.misr")
        return piece._replace(x=misr.output(piece.x))
    blocks = [
        residual(piece, block, state, clock, f"{name}.mrf.{i}") for i, block in enumerate(stage.mrf)
    ]
    delay = max(block.delay for block in blocks)
    xs = [
        state.delayed(f"{name}.mrf.{i}.output", block.x, delay - block.delay)
        for i, block in enumerate(blocks)
    ]
    return blocks[0]._replace(x=sum(xs) / len(xs), delay=delay)


def upsample(
    piece: Piece,
    weight: torch.Tensor,
    state: State,
    clock: Clock,
    name: str,
    rate: int,
    padding: int,
) -> Piece:
    """Applies a transposed convolution without its bias."""
    x = (piece.x * clock.mask(piece)).flatten(2)
    y, size, tail_size = F.conv_transpose1d(x, weight, stride=rate), x.shape[2] * rate, 0
    tail_size = y.shape[2] - size
    if tail_size > 0:
        y = y + F.pad(state.read(name, *y.shape[:2], tail_size), (0, size))
        state.write(y[:, :, size:])
    delay = piece.delay * rate + padding
    return Piece(y[:, :, :size].unsqueeze(2), rate=piece.rate * rate, delay=delay)


def reflect_start(piece: Piece, state: State, clock: Clock) -> Piece:
    """Puts the second position before the first one, as ReflectionPad1d((1, 0)) does."""
    x = state.with_past("pad_post", piece.x, 2)
    is_first = clock.positions(piece.rate, piece.delay + 1) == 0
    x = torch.where(is_first, x[..., 2:], x[..., :-2])
    return piece._replace(x=x, delay=piece.delay + 1, extra=1)


def run_istft(piece: Piece, head: ISTFTHead, state: State, clock: Clock) -> Piece:
    """Applies an ISTFTHead."""
    how = {"rate": head.hop_size, "padding": head.n_fft // 2}
    spectrum = head.to_spectrum(piece.x.flatten(2)).unsqueeze(2)
    wav = upsample(piece._replace(x=spectrum), head.basis, state, clock, "overlap_add", **how)
    ones = torch.ones_like(spectrum[:, :1])
    window_sum = upsample(
        piece._replace(x=ones), head.squared_window, state, clock, "window_sum", **how
    )
    return wav._replace(x=(wav.x / window_sum.x.clamp(min=1e-6))[:, :, 0])


class HarmonicStream(nn.Module):
    """A HarmonicNoiseHead for pieces; see HarmonicStream of streaming.py."""

    def __init__(self, head):
        super().__init__()
        self.head = head
        self.lookahead = GRIFFIN_LIM_LOOKAHEAD
        self.steps = stream_steps(head, self.lookahead)

    def forward(self, piece: Piece, mel: torch.Tensor, state: State, clock: Clock) -> Piece:
        head = self.head
        head.prepare()
        mel = state.delayed("delayed_mel", mel, piece.delay)
        correction, aperiodicity, f0, conditioning = piece.x[:, :, 0].split(head.splits, dim=1)
        aperiodicity = aperiodicity.sigmoid()
        log_f0, voicing = head.source.log_f0(f0), head.voicing(aperiodicity).double()
        pulses, noise = self.excitation(
            torch.cat([log_f0, voicing], dim=1)[0], piece.delay, state, clock
        )
        spectrum, log_magnitude, patches = head.unrefined(
            pulses, noise, correction, aperiodicity, mel, conditioning
        )
        patches = convolve(
            piece._replace(x=patches), head.refiner.conv_pre, state, clock, "refiner.conv_pre"
        )
        patches = residual(patches, head.refiner.resblock, state, clock, "refiner")
        wait = patches.delay - piece.delay
        spectrum = state.delayed("spectrum", spectrum, wait)
        log_magnitude = state.delayed("log_magnitude", log_magnitude, wait)
        magnitude = head.magnitude(log_magnitude + head.refiner.to_bins(patches.x))
        magnitude = magnitude * clock.mask(patches._replace(x=magnitude))
        wav = self.griffin_lim(spectrum, magnitude, patches.delay, state, clock)
        delay = (patches.delay + self.lookahead) * head.stft.hop_size + head.stft.margins[0]
        return Piece(wav.unsqueeze(1), rate=head.stft.hop_size, delay=delay)

    def excitation(
        self, tracks: torch.Tensor, delay: int, state: State, clock: Clock
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns Z of pulses and noise from log F0 and voicing, tracks [2, n] in float64."""
        source, stft = self.head.source, self.head.stft
        f0, phase, voicing = self.windows(tracks, clock.positions(1, delay), state)
        wrapped_phase = (phase - phase.round()).float()
        f0, voicing = f0.float(), voicing.float()
        hops = clock.positions(1, delay)[:, None] + torch.arange(stft.hops)
        noise = source.noise[hops % len(source.noise)].flatten(1)[:, : stft.n_fft]
        noise = noise * source.burst_envelope(wrapped_phase, voicing)
        pulses = source.pulse_train(f0, wrapped_phase)
        return self.spectra(pulses), self.spectra(noise)

    def spectra(self, frames: torch.Tensor) -> torch.Tensor:
        """Returns Z [1, 2, positions, n] of frames [n, n_fft].

        As GraphSTFT.forward does, with a matrix product of all frames in place of a convolution
        of each.
        """
        stft, n = self.head.stft, len(frames)
        frames = F.pad(frames, (0, stft.hops * stft.hop_size - stft.n_fft))
        # [N2, n, n1] @ [N2, n1, 2 * k1]
        frames = frames.reshape(n, -1, stft.groups).permute(2, 0, 1)
        inner = stft.inner.reshape(stft.groups, 2 * stft.rows, stft.per_hop, stft.hops)
        x = frames @ inner.permute(0, 3, 2, 1).flatten(1, 2)
        x = x.transpose(1, 2).reshape(2 * stft.groups, -1)
        return (stft.outer @ x).reshape(1, 2, stft.groups * stft.rows, n)

    def windows(
        self, tracks: torch.Tensor, positions: torch.Tensor, state: State
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns F0, unwrapped phase and voicing, [n, n_fft] each; see ExcitationStream."""
        source, stft, n = self.head.source, self.head.stft, tracks.shape[1]
        hop_size, half = stft.hop_size, (stft.hop_size + 1) // 2
        known = stft.margins[0] + half  # samples of a window up to the centre of its frame
        # Up to the first frame, tracks are held and the phase is 0 at its start.
        first = tracks.index_select(1, (-positions[:1]).clamp(0, n - 1))
        is_start = positions[:1] <= 0
        tracks = torch.where(positions < 0, first, tracks)
        last = torch.where(is_start, first, state.read("tracks", 2, 1, dtype=torch.float64))
        state.write(tracks[:, -1:])
        tracks = torch.cat([last, tracks], dim=1)
        before, after = tracks[:, :-1, None], tracks[:, 1:, None]
        between = (before + (after - before) * source.later).flatten(1)
        f0, voicing = between[:1].exp(), between[1:]
        first_f0, rate, size = first[:1].exp(), source.sampling_rate, known - hop_size
        start = first_f0 / rate * ((positions[:1] - 1) * hop_size + half)
        phase = torch.where(is_start, start, state.read("phase", 1, 1, dtype=torch.float64))
        cycles = f0 / rate
        phase = phase + cycles.cumsum(1) - cycles
        next_phase = phase[:, -1:] + cycles[:, -1:]
        whole = next_phase.round()
        state.write(next_phase - whole)
        past_phase = start + first_f0 / rate * (torch.arange(size) - size)
        held = torch.cat([first_f0.expand(1, size), past_phase, first[1:].expand(1, size)])
        past = state.read("excitation", 3, size, dtype=torch.float64)
        past = torch.where(is_start, held, past)
        signals = torch.cat([past, torch.cat([f0, phase, voicing])], dim=1)
        wraps = torch.cat([torch.zeros_like(whole), whole, torch.zeros_like(whole)])
        state.write(signals[:, n * hop_size :] - wraps)
        signals = torch.stack(
            [signals[:, i * hop_size : i * hop_size + known] for i in range(n)], dim=1
        )  # [3, n, known]
        return self.with_held(signals, tracks[:, 1:])

    def with_held(self, signals: torch.Tensor, tracks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Holds F0 and voicing from the centre of each frame to the end of its window."""
        n, known, n_fft = signals.shape[1], signals.shape[2], self.head.stft.n_fft
        rate, size = self.head.source.sampling_rate, n_fft - known
        f0, voicing = tracks[0, :, None].exp(), tracks[1, :, None]
        first_phase = signals[1, :, -1:] + signals[0, :, -1:] / rate
        phase = first_phase + f0 / rate * torch.arange(size)
        held = torch.stack([f0.expand(n, size), phase, voicing.expand(n, size)])
        return torch.cat([signals, held], dim=2).unbind(0)

    def griffin_lim(
        self,
        spectrum: torch.Tensor,
        magnitude: torch.Tensor,
        delay: int,
        state: State,
        clock: Clock,
    ) -> torch.Tensor:
        """Returns samples [1, n * hop_size]; see GriffinLimStream."""
        stft, n, ahead = self.head.stft, clock.n, self.lookahead
        start = WithMagnitude(magnitude)(spectrum, is_extrapolated=False)
        pending = []
        for name, x in (("phase", start / SCALE), ("previous", start), ("magnitude", magnitude)):
            past = state.read(f"griffin_lim.{name}", *x.shape[:3], ahead)
            pending.append(torch.cat([past, x], dim=3))
            state.write(past)  # replaced below
        slots = [len(state.next) - 3 + i for i in range(3)]
        tail = state.read("griffin_lim.tail", 1, stft.hop_size, stft.hops - 1)
        pieces = []
        for i in range(n):
            # The frames whose windows overlap those of the pending ones.
            position = clock.frames + (i - delay - ahead)
            frames = position + torch.arange(1 - stft.hops, ahead + 1)
            normaliser = stft.normaliser(clock.is_valid(frames)[None, None])
            normaliser = normaliser[:, :, stft.hops - 1 :]
            piece, tail, pending = self.settle(pending, tail, normaliser, position >= 0)
            pieces.append(piece)
        state.write(tail)
        for slot, x in zip(slots, pending, strict=True):
            state.next[slot] = x
        return stft.to_wav(torch.cat(pieces, dim=2))

    def settle(
        self,
        pending: list[torch.Tensor],
        tail: torch.Tensor,
        normaliser: torch.Tensor,
        is_started: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Settles the first pending frame; returns its hop, the new tail, and what is pending."""
        stft, count = self.head.stft, self.lookahead + 1
        phase, previous, magnitude = (x[..., :count] for x in pending)
        with_magnitude = WithMagnitude(magnitude)
        old = phase, previous
        for _ in range(self.steps):
            wav = stft.inverse(with_magnitude(phase, is_extrapolated=True))
            wav = (wav + F.pad(tail, (0, count))) * normaliser
            spectrum = stft(wav)
            phase, previous = extrapolate(previous, spectrum), spectrum
        phase, previous = (
            torch.where(is_started, x, y) for x, y in zip((phase, previous), old, strict=True)
        )
        settled = WithMagnitude(magnitude[..., :1])(phase[..., :1], is_extrapolated=True)
        wav = stft.inverse(settled) + F.pad(tail, (0, 1))
        rest = [
            torch.cat([new[..., 1:], x[..., count:]], dim=3)
            for new, x in zip((phase, previous, magnitude), pending, strict=True)
        ]
        return wav[:, :, :1] * normaliser[:, :, :1], wav[:, :, 1:], rest
