"""Distils a trained vocoder into a lighter one, without discriminators and on any speech.

    python distill.py --teacher_file hifigan/g_02500000 --config config_v1.json \\
        --checkpoint_path cp_distilled --precision bf16 --training_steps 20000
    python distill.py --teacher_file pretrained/frame_v2_universal/g_* \\
        --config configs/frame_v3.json --checkpoint_path cp_light --precision bf16

A MISR is trained stage by stage on a HiFi-GAN. It starts with the teacher's conv_pre, ups and
conv_post, which stay fixed, and its shared blocks start as the MRF's blocks of their kernel size.
Each MISR receives the input of the teacher's MRF and is trained to produce the MRF's output:

    teacher   mel -> conv_pre -> up -> MRF -> up -> MRF -> ... -> conv_post -> wav
                                  |     ^      |     ^
    student                       +-> MISR     +-> MISR      trained separately, in one update

Small errors of the stages add up. So the chain of all MISRs, each fed by the one before, is also
trained on a mel loss against the teacher's waveform.

A frame-rate generator is trained on a larger one: on its F0 and aperiodicity and, for the same
excitation, on its log magnitudes.

The teacher provides targets for any mel, so the mels are also scaled to other levels. `g_*` files
contain a running average of the student's weights. train.py can resume such a run.
"""

import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import State, build_state, locked, resume_or_start, run_meta
from distributed import (
    as_ddp,
    count_processes,
    joined_processes,
    launch,
    raise_on_all_ranks,
    rank,
    select_device,
    world_size,
)
from env import Config, UserError
from harmonic import random_phase_state
from inference import load_generator, to_inference
from losses import LOSSES, Loss, MelLoss
from meldataset import MEL_KEYS
from models import LRELU_SLOPE, Generator, fuse
from monitor import describe
from muon import MUON_LR_SCALE, Muon
from train import Losses, add_arguments, read_config, read_data, run, schedule_of
from utils import command_line, command_parser, say, say_if_slow
from weights import load_matching, mrf_as_misr

# These values were found by measurement; docs/ablations.md lists what else was tried.
WARM_UP = 50  # updates
MAX_GRADIENT_NORM = 5.0
# The mel loss of the whole generator is added from this share of the run on, or at once after a
# warm start. Earlier it lowers the quality, because the stages still have large errors. A run
# without --training_steps counts as one of OPEN_RUN updates.
WHOLE_FROM, OPEN_RUN = 0.7, 5000
AVERAGE = 0.99  # decay of the running average of weights, per update
MIN_LOG_GAIN = math.log(0.1)  # of the random gains that make mels quieter
QUIET_FRAME = 0.05  # share of the mean frame; added to the divisor of relative errors

FRAME_RATE_LOSSES = (
    Loss("f0", "F0"),
    Loss("aperiodicity", "Aperiodicity"),
    Loss("log_magnitude", "Log Magnitude"),
)
WEIGHTS = {"gen_loss_mel": 0.3, "f0": 2.0, "aperiodicity": 2.0}  # 1 for other losses
OUTER_LAYERS = ("conv_pre", "ups", "conv_post")

# Keys in which teacher and student must agree beside MEL_KEYS, for training stage by stage.
WIDTH_KEYS = (
    *("upsample_rates", "upsample_kernel_sizes", "upsample_initial_channel"),
    *("gen_istft_n_fft", "gen_istft_hop_size"),
)


def check_teacher(teacher: Config, student: Config, path: Path) -> None:
    """Raises UserError if a teacher, read from `path`, cannot train a student; names the key."""
    if teacher.is_frame_rate != student.is_frame_rate:
        theirs, ours = ("with" if h.is_frame_rate else "without" for h in (teacher, student))
        raise UserError(
            f"{path}: its config is {theirs} griffin_lim_steps, the student's {ours}: expected two "
            "generators of one kind"
        )
    if not (student.uses_misr or student.is_frame_rate):
        raise UserError(
            f"{path}: can train a MISR only, and the student's config has resblock_kernel_sizes; "
            "use config_v1.json or config_v2.json"
        )
    theirs, ours = asdict(teacher), asdict(student)
    for key in MEL_KEYS if student.is_frame_rate else MEL_KEYS + WIDTH_KEYS:
        if theirs[key] != ours[key]:
            same = "mel" if student.is_frame_rate else "mel, rates and widths"
            raise UserError(
                f"{path}: its config has {key} = {theirs[key]}, the student's {ours[key]}: "
                f"expected the same {same}"
            )


# ----------------------------------------------------------------------------------------- losses


def distance(y: torch.Tensor, target: torch.Tensor, frame: int) -> torch.Tensor:
    """Returns the mean of two relative L1 distances of y to the target, both [B, C, T]: a scalar.

    The first is over all values. The second is the mean over mel frames, `frame` samples each, so
    that quiet frames count as much as loud ones.
    """
    y, target = y.float(), target.float()
    error, size = (x.abs().mean(1).unfold(1, frame, frame).mean(-1) for x in (y - target, target))
    by_frame = (error / (size + QUIET_FRAME * size.mean())).mean()
    return 0.5 * (y - target).abs().mean() / target.abs().mean() + 0.5 * by_frame


class StagewiseLoss(nn.Module):
    """Computes the errors of a student's stages, [stages, 2], and its mel loss, [].

    forward(mel [B, num_mels, T], with_whole). The first error of a stage is the distance of its
    MISR's output to the MRF's, for the MRF's input. The second is the distance after the teacher's
    next layer: the next transposed convolution or conv_post. The mel loss, None without
    `with_whole`, compares the teacher's waveform with that of the chain of the student's stages.
    """

    def __init__(self, student: Generator, teacher: Generator, h: Config, autocast: torch.autocast):
        super().__init__()
        self.student, self.teacher, self.autocast = student, teacher, autocast
        self.mel_loss = MelLoss(h)
        self.frames = [  # samples per mel frame, after each stage
            math.prod(h.upsample_rates[: stage + 1]) for stage in range(len(h.upsample_rates))
        ]

    def forward(
        self, mel: torch.Tensor, with_whole: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        teacher, errors, B = self.teacher, [], len(mel)
        with torch.no_grad():
            stage_input = teacher.ups[0](F.leaky_relu(teacher.first(mel), LRELU_SLOPE))
        for stage, (_, blocks) in enumerate(teacher.stages()):
            up = teacher.ups[stage + 1] if stage + 1 < len(teacher.ups) else None
            with torch.no_grad():
                expected = fuse(blocks, stage_input[:B])
                expected_next = self.next_layer(expected, up)
            with self.autocast:
                y = self.student.resblocks[stage](stage_input)
            y_next = self.next_layer(y, up)
            frame, next_frame = self.frames[stage], (self.frames + self.frames[-1:])[stage + 1]
            errors += [
                distance(y[:B], expected, frame),
                distance(y_next[:B], expected_next, next_frame),
            ]
            stage_input = expected_next
            if with_whole:  # the student's own chain is the second half of the batch
                stage_input = torch.cat((expected_next, y_next[-B:]))
        errors = torch.stack(errors).reshape(-1, 2)
        if not with_whole:
            return errors, None
        wav, wav_hat = teacher.head(stage_input.float(), mel).squeeze(1).split(B)
        return errors, self.mel_loss(wav_hat, wav)

    def next_layer(self, x: torch.Tensor, up: nn.Module | None) -> torch.Tensor:
        """Applies the teacher's next layer to x: `up`, or conv_post after the last stage."""
        if up is None:
            return self.teacher.last(x.to(self.teacher.conv_post.bias.dtype))
        return up(F.leaky_relu(x.to(up.bias.dtype), LRELU_SLOPE))


class HarmonicLoss(nn.Module):
    """Computes the errors of a frame-rate student: mel [B, num_mels, T] -> FRAME_RATE_LOSSES, [3].

    They are the L1 distances of log F0, weighted by the voicing of each frame, of aperiodicity, and
    of log magnitudes. Student and teacher get the teacher's excitation for the log magnitudes, so
    that the random phases do not matter.
    """

    def __init__(self, student: Generator, teacher: Generator, autocast: torch.autocast):
        super().__init__()
        self.student, self.teacher, self.autocast = student, teacher, autocast

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        student, teacher = self.student, self.teacher
        with torch.no_grad():
            x = teacher.features(mel)
            target_f0, target_aperiodicity = teacher.head.f0_aperiodicity(x)
            excitation = teacher.head.excitation(x, random_phase_state(mel))
            _, target_magnitude = teacher.head.spectrum(x, mel, excitation)
        with self.autocast:
            x = student.features(mel)
            log_f0, aperiodicity = student.head.f0_aperiodicity(x)
            _, log_magnitude = student.head.spectrum(x, mel, excitation)
        voicing = teacher.head.voicing(target_aperiodicity)
        f0_error = (voicing * (log_f0 - target_f0).abs()).sum() / voicing.sum().clamp(min=1)
        aperiodicity_error = F.l1_loss(aperiodicity, target_aperiodicity)
        magnitude_error = F.l1_loss(log_magnitude, target_magnitude)
        return torch.stack([f0_error.float(), aperiodicity_error, magnitude_error])


# ------------------------------------------------------------------------------------- the update


def init_from_teacher(student: Generator, teacher: Generator, h: Config) -> None:
    """Loads the teacher's layers that fit into the student, both without weight norm."""
    weights, note = teacher.state_dict(), ""
    if not h.is_frame_rate:
        weights, note = mrf_as_misr(weights, h)
    taken, left = load_matching(student, weights)
    say(f"{len(taken)} of {len(taken) + len(left)} layers from the teacher{note}")


class Distillation:
    """The update of distill.py, with the student and its optimizer.

    `state.generator` is the running average of the student's weights: it is validated and saved as
    `g_*`. The student and the optimizer are saved in `do_*`.
    """

    def __init__(self, state: State, teacher: Generator, last_step: int | None, is_warm: bool):
        h = state.h
        self.last_step = last_step
        self.whole_from = 0 if is_warm else WHOLE_FROM * (last_step or OPEN_RUN)
        torch.manual_seed(h.seed)
        self.student, self.teacher = Generator(h).to(state.device), teacher
        for generator in (self.student, state.generator, teacher):
            generator.remove_weight_norm()
        init_from_teacher(self.student, teacher, h)
        state.generator.load_state_dict(self.student.state_dict())
        # A copy in full precision, because to_inference may turn the teacher into bfloat16.
        self.outer_layers = {
            key: value.clone()
            for key, value in teacher.state_dict().items()
            if not h.is_frame_rate and key.startswith(OUTER_LAYERS)
        }
        for layer in OUTER_LAYERS if self.outer_layers else ():
            self.student.get_submodule(layer).requires_grad_(False)
        to_inference(teacher, state.device, state.precision)
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        lr = MUON_LR_SCALE * h.learning_rate
        self.muon = Muon(self.trained, lr, betas=(h.adam_b1, h.adam_b2))
        state.more = {"student": self.student, "muon": self.muon}
        loss = (
            HarmonicLoss(self.student, teacher, state.autocast())
            if h.is_frame_rate
            else StagewiseLoss(self.student, teacher, h, state.autocast())
        )
        self.loss = loss.to(state.device)

    def start(self, state: State, compiled: bool) -> None:
        """Completes the setup after a resume or a warm start has changed the weights."""
        if state.steps == 0:
            self.student.load_state_dict(state.generator.state_dict())
        for generator in (self.student, state.generator):  # files may be of another teacher
            generator.load_state_dict(generator.state_dict() | self.outer_layers)
        if compiled:
            self.loss.compile()
        self.loss = as_ddp(self.loss, state.device)

    def update(self, state: State, mel: torch.Tensor, wav: torch.Tensor) -> Losses:
        """Updates the student on mel [B, num_mels, T]; `wav` is not used."""
        lr = self.learning_rate(state)
        for optimizer in (self.muon, state.optim_g):  # the monitor reads optim_g's
            for group in optimizer.param_groups:
                group["lr"] = lr
        errors = self.errors(at_other_levels(mel, state), state)
        loss = sum(WEIGHTS.get(name, 1.0) * error for name, error in errors.items())
        self.student.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, MAX_GRADIENT_NORM)
        self.muon.step()
        self.average(state)
        losses = {"gen_loss_total": loss, "gradient_norm_student": norm} | errors
        return {name: value.detach() for name, value in losses.items()}

    def errors(self, mel: torch.Tensor, state: State) -> Losses:
        """Returns the student's errors for mel [B, num_mels, T], by name."""
        if state.h.is_frame_rate:
            names = [loss.name for loss in FRAME_RATE_LOSSES]
            return dict(zip(names, self.loss(mel), strict=True))
        of_stages, of_whole = self.loss(mel, state.steps >= self.whole_from)
        errors = {} if of_whole is None else {"gen_loss_mel": of_whole}
        for stage, row in enumerate(of_stages, start=1):
            errors[f"stage_{stage}"], errors[f"stage_{stage}_next"] = row
        return errors

    def learning_rate(self, state: State) -> float:
        """Returns the learning rate: a linear warm-up, then a cosine to 0 at --training_steps."""
        progress = state.steps / self.last_step if self.last_step else 0.0
        lr = MUON_LR_SCALE * state.h.learning_rate
        lr *= 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return lr * min(1.0, (state.steps + 1) / WARM_UP)

    @torch.no_grad()
    def average(self, state: State) -> None:
        """Moves the running average towards the student, faster in the first updates."""
        kept = min(AVERAGE, (state.steps + 1) / (state.steps + 11))
        pairs = zip(state.generator.parameters(), self.student.parameters(), strict=True)
        for average, param in pairs:
            average.lerp_(param, 1 - kept)


def printed_losses(h: Config) -> tuple[Loss, ...]:
    """Returns the declarations of the losses of a distillation."""
    if h.is_frame_rate:
        return (*LOSSES, *FRAME_RATE_LOSSES)
    stages = [f"stage_{stage}" for stage in range(1, len(h.upsample_rates) + 1)]
    names = [name for stage in stages for name in (stage, f"{stage}_next")]
    return (*LOSSES, *(Loss(name, printed=name) for name in names))


def at_other_levels(mel: torch.Tensor, state: State) -> torch.Tensor:
    """Returns log-mels [B, num_mels, T], half of them lowered by a random gain, up to 20 dB.

    The gains depend on the seed and the step alone.
    """
    random = torch.Generator().manual_seed(state.h.seed * 1_000_003 + state.steps)
    # Drawn for the clips of all processes, so that their number does not matter.
    gain, choice = torch.rand(2, len(mel) * world_size(), 1, 1, generator=random).to(mel.device)
    gain, choice = (x[rank() :: world_size()] for x in (gain, choice))
    gain = torch.where(choice < 0.5, MIN_LOG_GAIN * gain, 0.0) / state.h.log_amplitude_scale
    return (mel + gain).clamp(min=state.h.silent_log_mel)


# ------------------------------------------------------------------------------------------- main


def main() -> int:
    """Parses the flags, builds or resumes the state, and distils; returns the exit status."""
    parser = command_parser(
        "Distils a trained vocoder into a lighter one. Run it again to resume. Ctrl-C saves and\n"
        "stops.",
        example="python distill.py --teacher_file hifigan/g_02500000 --config config_v1.json \\\n"
        "    --checkpoint_path cp_distilled --precision bf16 --training_steps 20000",
    )
    help_ = "the generator to distil, g_*, with its config.json beside it"
    parser.add_argument("--teacher_file", type=Path, metavar="FILE", required=True, help=help_)
    add_arguments(parser)
    a = parser.parse_args()
    folder, processes = Path(a.checkpoint_path), count_processes(a.device)
    if processes > world_size():
        read_config(a.config, processes)  # an error is printed once, before processes start
        return launch(processes)
    device, h = select_device(a.device), read_config(a.config, processes, say)
    say_if_slow(a.precision, device)
    with joined_processes(device):
        with raise_on_all_ranks():
            teacher, teacher_h = load_generator(a.teacher_file)
            check_teacher(teacher_h, h, a.teacher_file)
            h = replace(h, discriminator_train_start_steps=None)
            state = build_state(h, device, a.precision)
            state.meta = run_meta(Path(a.config).read_bytes())
            distillation = Distillation(state, teacher, a.training_steps, bool(a.warm_start))
            clips, validation = read_data(a, h)
        with locked(folder):
            resume_or_start(state, folder, warm_start_files=a.warm_start, is_fine_tuning=False)
            with raise_on_all_ranks():
                describe(state, clips, a.config, folder)
            distillation.start(state, a.compile)
            return run(
                *(state, clips, validation, distillation.update),
                schedule=schedule_of(a),
                folder=folder,
                eval_metrics=a.eval_metrics,
                losses=printed_losses(h),
            )


if __name__ == "__main__":
    command_line(main)
