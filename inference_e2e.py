"""Turns log-mels, an acoustic model's for instance, into speech: .npy -> wav.

python inference_e2e.py --input_mels_dir test_mel_files --checkpoint_file cp_misrnet/g_00500000
"""

from functools import partial
from pathlib import Path

from audio import load_mel
from inference import Mel, add_arguments, start, vocode_files
from utils import command_line, command_parser, plan_outputs


def read_mel(path: Path, num_mels: int) -> Mel:
    """The mel of a .npy file; raises UserError as `load_mel` does."""
    mel = load_mel(path, num_mels)
    return Mel(mel.shape[1], lambda first, stop: mel[:, first:stop])


def main() -> int:
    """Vocodes a folder of .npy mels."""
    parser = command_parser(
        "Log-mels to <output_dir>/<name>_generated_e2e.wav for each, PCM 16.",
        example="python inference_e2e.py --input_mels_dir test_mel_files "
        "--checkpoint_file cp_misrnet/g_00500000",
    )
    add_arguments(
        parser,
        flag="--input_mels_dir",
        holds=".npy files, [num_mels, T] or [1, num_mels, T], natural logarithm, by the config's "
        "recipe",
        default="test_mel_files",
        output_dir="generated_files_from_mel",
    )
    a = parser.parse_args()
    generator, h = start(a)
    jobs = plan_outputs(a.input_mels_dir, (".npy",), a.output_dir, "_generated_e2e.wav")
    return vocode_files(generator, h, jobs, partial(read_mel, num_mels=h.num_mels), a)


if __name__ == "__main__":
    command_line(main)
