"""Writes a generator in the form for shipping: half precision, without weight norm; half the size.

    python tools/convert.py --checkpoint_file cp_misrnet/g_00500000 --output_dir shipped

The file keeps its name and loads wherever a g_* file does; its config.json goes with it.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts
from checkpoint import write_checkpoint
from env import UserError
from inference import load_generator
from utils import atomic_write, command_line, command_parser


def main() -> None:
    """Converts one file."""
    parser = command_parser(
        "Writes a generator in half precision, without weight norm.",
        example="python tools/convert.py --checkpoint_file cp_misrnet/g_00500000 "
        "--output_dir shipped",
    )
    parser.add_argument("--checkpoint_file", type=Path, metavar="FILE", required=True, help="g_*")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", required=True, help="for both")
    a = parser.parse_args()
    if a.output_dir.resolve() == a.checkpoint_file.resolve().parent:
        raise UserError(f"{a.output_dir}: holds {a.checkpoint_file} itself; name another folder")
    config, kept = a.checkpoint_file.with_name("config.json"), a.output_dir / "config.json"
    generator, _ = load_generator(a.checkpoint_file)
    if kept.exists() and kept.read_bytes() != config.read_bytes():
        raise UserError(f"{kept}: of another generator; name another --output_dir")
    weights = {key: value.half() for key, value in generator.state_dict().items()}
    path = a.output_dir / a.checkpoint_file.name
    with atomic_write(path) as temporary:
        write_checkpoint(temporary, {"generator": weights}, path)
    shutil.copy(config, kept)
    sizes = [file.stat().st_size / 1e6 for file in (a.checkpoint_file, path)]
    print(f"{path}: {sizes[1]:.1f} MB, {sizes[0]:.1f} MB before")


if __name__ == "__main__":
    command_line(main)
