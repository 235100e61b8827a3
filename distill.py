"""Teaches a generator what a trained one does: no adversary, and any speech will do.

    python distill.py --teacher_file hifigan/g_02500000 --config config_v1.json \\
        --checkpoint_path cp_distilled --precision bf16 --training_steps 20000
    python distill.py --teacher_file pretrained/frame_v2_universal/g_* \\
        --config configs/frame_v3.json --checkpoint_path cp_light --precision bf16

A MISR learns from a HiFi-GAN, stage by stage. It begins with the teacher's conv_pre, ups and
conv_post, which stay, and with the MRF's block of its own kernel size as the shared block. Each
MISR is then given what the teacher's MRF of its stage is given, and learns to give what that gives:

    teacher   mel -> conv_pre -> up -> MRF -> up -> MRF -> ... -> conv_post -> wav
                                  |     ^      |     ^
    student                       +-> MISR     +-> MISR      each alone, all in one update

and all of them in a row, each given what the one before has made, learn to make a waveform of the
teacher's mel, because small errors add up and cost energy.

A light generator at the mel's own rate learns from a larger one: the voice that it hears in a mel
and, of the same pulses and noise, the magnitudes that it makes.

The teacher answers any mel, so mels at other levels cost nothing. `g_*` files hold a running
average of the student, which validation hears; train.py goes on from them.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import State, build_state
from distributed import as_ddp, rank, world_size
from env import Config, UserError
from harmonic import random_phase_state
from inference import load_generator
from inference import to_inference as as_speaker
from launch import add_arguments, launch_or_train
from loop import Losses, Update
from losses import MelLoss
from meldataset import SILENT_LOG_MEL
from models import LRELU_SLOPE, Generator, fuse
from muon import RATE, Muon
from utils import command_line, command_parser, say
from weights import load_matching, mrf_as_misr, to_hifigan_names, to_native_names

# The recipe, found by measurement: docs/distillation.md has what else was tried.
WARM_UP = 50  # updates
MAX_GRADIENT_NORM = 5.0
# The mel loss of the whole, beside the errors of the stages, from this share of the run on, or from
# a warm start on: while stages err much, it spoils the sound. A run whose end is open counts as one
# of 5,000 updates.
WHOLE_FROM, OPEN_RUN = 0.7, 5000
AVERAGE = 0.99  # of the weights, from one update to the next
QUIETEST_GAIN = math.log(0.1)  # of mels, whose levels vary
QUIET_FRAME = 0.05  # of the mean size of a frame: where relative errors begin to be relative to it

FRAME_ERRORS = ("pitch", "noise", "log_magnitude")
WEIGHTS = {"gen_loss_mel": 0.3, "pitch": 2.0, "noise": 2.0}  # of errors; of the others 1

# What both must have in common: the mel and, for the student's stages to be the teacher's, widths.
MEL_KEYS = ("num_mels", "n_fft", "hop_size", "win_size", "sampling_rate", "fmin", "fmax")
WIDTH_KEYS = (
    *("upsample_rates", "upsample_kernel_sizes", "upsample_initial_channel"),
    *("gen_istft_n_fft", "gen_istft_hop_size"),
)


def check_teacher(teacher: Config, student: Config, path: Path) -> None:
    """Raises UserError, naming the first key, where the two do not correspond."""
    if teacher.is_frame_rate != student.is_frame_rate:
        theirs, ours = ("with" if h.is_frame_rate else "without" for h in (teacher, student))
        raise UserError(
            f"{path}: its config is {theirs} griffin_lim_steps, the student's {ours}: expected two "
            "generators of one kind"
        )
    if not (student.uses_misr or student.is_frame_rate):
        raise UserError(
            f"{path}: teaches a MISR only, and the student's config has resblock_kernel_sizes; "
            "take config_v1.json or config_v2.json"
        )
    theirs, ours = asdict(teacher), asdict(student)
    for key in MEL_KEYS if student.is_frame_rate else MEL_KEYS + WIDTH_KEYS:
        if theirs[key] != ours[key]:
            same = "mel" if student.is_frame_rate else "mel, rates and widths"
            raise UserError(
                f"{path}: its config has {key} = {theirs[key]}, the student's {ours[key]}: "
                f"expected the same {same}"
            )


def init_from_teacher(student: Generator, teacher: Generator, h: Config) -> dict[str, torch.Tensor]:
    """Gives the student the teacher's outer layers, which stay, and its block of that kernel.

    Returns the outer layers.
    """
    weights, note = mrf_as_misr(to_hifigan_names(teacher), h)
    own = student.state_dict()
    fitting = {
        key: value
        for key, value in to_native_names(weights, student).items()
        if key in own and own[key].shape == value.shape
    }
    student.load_state_dict(own | fitting)
    for layer in (student.conv_pre, student.ups, student.conv_post):
        layer.requires_grad_(False)
    say(f"{len(fitting)} of {len(own)} tensors from the teacher{note}")
    return {key: value for key, value in fitting.items() if not key.startswith("resblocks.")}


def distance(y: torch.Tensor, target: torch.Tensor, frame: int) -> torch.Tensor:
    """How far y is from the target, both [B, C, T], as a share of the target's size: a scalar.

    The mean of two relative L1 distances: over everything, and with each mel frame, which is
    `frame` samples, weighed alike, so that quiet ones count too.
    """
    y, target = y.float(), target.float()
    error, size = (x.abs().mean(1).unfold(1, frame, frame).mean(-1) for x in (y - target, target))
    by_frame = (error / (size + QUIET_FRAME * size.mean())).mean()
    return 0.5 * (y - target).abs().mean() / target.abs().mean() + 0.5 * by_frame


class StagewiseLoss(nn.Module):
    """The student's errors for a mel [B, num_mels, T]: of stages, [stages, 2]; of the whole, [].

    Of a stage, the first is the error of what its MISR gives for what the teacher's MRF is given;
    the second what is left of it after the teacher's next layer, where it matters: the next
    transposed convolution or, after the last, conv_post. Of the whole: the mel loss between the
    teacher's waveform and the student's own, for which each stage is given what the one before has
    made; None where that is not asked for.
    """

    def __init__(self, student: Generator, teacher: Generator, h: Config, autocast: torch.autocast):
        super().__init__()
        self.student, self.autocast, self.mel_loss = student, autocast, MelLoss(h)
        self.teacher = [teacher]  # hidden: it has nothing to learn or to save
        self.frames = [
            math.prod(h.upsample_rates[: stage + 1]) for stage in range(len(h.upsample_rates))
        ]

    def forward(
        self, mel: torch.Tensor, with_whole: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        (teacher,) = self.teacher
        errors, B = [], len(mel)
        with torch.no_grad():
            heard = teacher.ups[0](F.leaky_relu(teacher.first(mel), LRELU_SLOPE))
        for stage, (_, blocks) in enumerate(teacher.stages()):
            up = teacher.ups[stage + 1] if stage + 1 < len(teacher.ups) else None
            with torch.no_grad():
                expected = fuse(blocks, heard[:B])
                expected_next = self.after(expected, up)
            with self.autocast:
                y = self.student.resblocks[stage](heard)
            y_next = self.after(y, up)
            frame, rate = self.frames[stage], (self.frames + self.frames[-1:])[stage + 1]
            errors += [
                distance(y[:B], expected, frame),
                distance(y_next[:B], expected_next, rate),
            ]
            heard = expected_next  # by the teacher; and by the student
            if with_whole:
                heard = torch.cat((heard, y_next[-B:]))
        errors = torch.stack(errors).reshape(-1, 2)
        if not with_whole:
            return errors, None
        head = teacher.istft or torch.tanh
        wav, wav_hat = head(heard.float()).squeeze(1).split(B)
        return errors, self.mel_loss(wav_hat, wav)

    def after(self, x: torch.Tensor, up: nn.Module | None) -> torch.Tensor:
        """x after the teacher's next layer."""
        (teacher,) = self.teacher
        if up is None:
            return teacher.last(x.to(teacher.conv_post.bias.dtype))
        return up(F.leaky_relu(x.to(up.bias.dtype), LRELU_SLOPE))


class HarmonicLoss(nn.Module):
    """The student's errors for a mel [B, num_mels, T], as FRAME_ERRORS: [3].

    Both work at the mel's own rate. The mean distances of log pitch, the more voiced a frame the
    more it counts, of the share of noise, and of log magnitudes. These both give to the teacher's
    pulses and noise: so there is one right answer, whatever the chance in them.
    """

    def __init__(self, student: Generator, teacher: Generator, autocast: torch.autocast):
        super().__init__()
        self.student, self.autocast = student, autocast
        self.teacher = [teacher]  # hidden, as in StagewiseLoss

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        (teacher,) = self.teacher
        with torch.no_grad():
            x = teacher.features(mel)
            sources = teacher.head.sources(x, random_phase_state(mel))
            _, expected = teacher.head.spectrum(x, mel, sources)
        with self.autocast:
            x = self.student.features(mel)
            log_f0, noise = self.student.head.voice(x)
            _, log_magnitude = self.student.head.spectrum(x, mel, sources)
        voice = sources.voice
        voiced = teacher.head.voiced(voice.noise)
        pitch = (voiced * (log_f0 - voice.log_f0).abs()).sum() / voiced.sum().clamp(min=1)
        others = F.l1_loss(noise, voice.noise), F.l1_loss(log_magnitude, expected)
        return torch.stack([pitch.float(), *others])


class Distillation:
    """The update of distill.py, and what it owns beyond train.py's state.

    `state.generator` becomes the average of the student's weights: what is validated and saved as
    `g_*`. The student itself and its optimizers are in `do_*`.
    """

    def __init__(self, state: State, teacher: Generator, last_step: int | None, is_warm: bool):
        self.last_step, h = last_step, state.h
        self.whole_from = 0 if is_warm else WHOLE_FROM * (last_step or OPEN_RUN)
        torch.manual_seed(h.seed)
        student = Generator(h).to(state.device)
        for generator in (student, state.generator):
            generator.remove_weight_norm()
        if h.is_frame_rate:
            taken, _ = load_matching(student, teacher.state_dict())
            say(f"{len(taken)} layers from the teacher")
            self.outer_layers = {}
            lesson = HarmonicLoss(student, teacher, state.autocast())
        else:
            self.outer_layers = init_from_teacher(student, teacher, h)
            lesson = StagewiseLoss(student, teacher, h, state.autocast())
        as_speaker(teacher, state.device, state.precision)
        state.generator.load_state_dict(student.state_dict())
        learnt = [p for p in student.parameters() if p.requires_grad]
        self.learnt, self.student = learnt, student
        self.muon = Muon(learnt, RATE * h.learning_rate, betas=(h.adam_b1, h.adam_b2))
        state.more = {"student": student, "muon": self.muon}
        self.lesson = lesson.to(state.device)

    def start(self, state: State, compiled: bool) -> Update:
        """Begins where `state` stands after a warm start, or after a resume; gives the update."""
        if state.steps == 0:
            self.student.load_state_dict(state.generator.state_dict())
        for generator in (self.student, state.generator):  # whose blocks may be of another teacher
            generator.load_state_dict(generator.state_dict() | self.outer_layers)
        if compiled:
            self.lesson.compile()
        self.lesson = as_ddp(self.lesson, state.device)
        return self.update

    def update(self, state: State, mel: torch.Tensor, wav: torch.Tensor) -> Losses:
        """One step; the teacher alone says what is right, so `wav` is not looked at.

        Args:
            mel: [B, num_mels, T].
        """
        rate = self.rate(state)
        for optimizer in (self.muon, state.optim_g):  # of which the second shows it to the monitor
            for group in optimizer.param_groups:
                group["lr"] = rate
        errors = self.errors(at_other_levels(mel, state), state)
        loss = sum(WEIGHTS.get(name, 1.0) * error for name, error in errors.items())
        self.student.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.learnt, MAX_GRADIENT_NORM)
        self.muon.step()
        self.average(state)
        losses = {"gen_loss_total": loss, "gradient_norm_student": norm} | errors
        return {name: value.detach() for name, value in losses.items()}

    def errors(self, mel: torch.Tensor, state: State) -> Losses:
        """The student's errors for a mel [B, num_mels, T], by the names that the terminal shows."""
        if state.h.is_frame_rate:
            return dict(zip(FRAME_ERRORS, self.lesson(mel), strict=True))
        of_stages, of_whole = self.lesson(mel, state.steps >= self.whole_from)
        errors = {} if of_whole is None else {"gen_loss_mel": of_whole}
        for stage, row in enumerate(of_stages, start=1):
            errors[f"stage_{stage}"], errors[f"stage_{stage}_next"] = row
        return errors

    def rate(self, state: State) -> float:
        """Up in WARM_UP updates and, where --training_steps ends the run, down to 0 by a cosine."""
        progress = state.steps / self.last_step if self.last_step else 0.0
        rate = RATE * state.h.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return rate * min(1.0, (state.steps + 1) / WARM_UP)

    @torch.no_grad()
    def average(self, state: State) -> None:
        """Moves the generator towards the student, the faster the fewer updates there were."""
        kept = min(AVERAGE, (state.steps + 1) / (state.steps + 11))
        pairs = zip(state.generator.parameters(), self.student.parameters(), strict=True)
        for average, param in pairs:
            average.lerp_(param, 1 - kept)


def at_other_levels(mel: torch.Tensor, state: State) -> torch.Tensor:
    """Log-mels [B, num_mels, T], half of them quieter by a gain that follows from seed and step."""
    random = torch.Generator().manual_seed(state.h.seed * 1_000_003 + state.steps)
    # Of the clips of all processes, of which each has its own.
    gain, chosen = torch.rand(2, len(mel) * world_size(), 1, 1, generator=random).to(mel.device)
    gain, chosen = (x[rank() :: world_size()] for x in (gain, chosen))
    gain = torch.where(chosen < 0.5, QUIETEST_GAIN * gain, 0.0)
    return (mel + gain).clamp(min=SILENT_LOG_MEL)


def prepare(
    a: argparse.Namespace, h: Config, device: torch.device
) -> tuple[State, Callable[[], Update]]:
    """A state with a student of --teacher_file, and what gives the update that teaches it."""
    teacher, its_h = load_generator(a.teacher_file)
    check_teacher(its_h, h, a.teacher_file)
    state = build_state(replace(h, discriminator_train_start_steps=None), device, a.precision)
    distillation = Distillation(state, teacher, a.training_steps, is_warm=bool(a.warm_start))
    return state, partial(distillation.start, state, a.compile)


def main() -> int:
    """Distils a generator."""
    parser = command_parser(
        "Teaches a generator what a trained one does. Run it again to resume; Ctrl-C saves and\n"
        "stops.",
        example="python distill.py --teacher_file hifigan/g_02500000 --config config_v1.json \\\n"
        "    --checkpoint_path cp_distilled --precision bf16 --training_steps 20000",
    )
    parser.add_argument(
        "--teacher_file",
        type=Path,
        metavar="FILE",
        required=True,
        help="the generator to learn from, g_*, with its config.json beside it",
    )
    add_arguments(parser)
    return launch_or_train(parser.parse_args(), prepare)


if __name__ == "__main__":
    command_line(main)
