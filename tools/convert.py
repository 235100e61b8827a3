"""Writes a generator for distribution: in half precision and without weight norm, half the size.

    python tools/convert.py --checkpoint_file cp_misrnet/g_00500000 --output_dir converted

The file keeps its name and loads like every g_* file. Its config.json is copied beside it.
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
        "Writes a generator in half precision and without weight norm.",
        example="python tools/convert.py --checkpoint_file cp_misrnet/g_00500000 "
        "--output_dir converted",
    )
    parser.add_argument("--checkpoint_file", type=Path, metavar="FILE", required=True, help="g_*")
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIR", required=True, help="for g_* and config.json"
    )
    a = parser.parse_args()
    convert(a.checkpoint_file, a.output_dir)


def convert(source: Path, output_dir: Path) -> None:
    """Writes the converted `source` and its config.json to `output_dir`.

    Raises:
        UserError: `output_dir` holds `source` itself or another generator, or `load_generator`'s.
    """
    if output_dir.resolve() == source.resolve().parent:
        raise UserError(f"{output_dir}: holds {source} itself; name another --output_dir")
    config, copy = source.with_name("config.json"), output_dir / "config.json"
    generator, _ = load_generator(source)
    if copy.exists() and copy.read_bytes() != config.read_bytes():
        raise UserError(f"{copy}: belongs to another generator; name another --output_dir")
    weights = {key: value.half() for key, value in generator.state_dict().items()}
    path = output_dir / source.name
    with atomic_write(path) as temporary:
        write_checkpoint(temporary, {"generator": weights}, path)
    shutil.copy(config, copy)
    before, after = (file.stat().st_size / 1e6 for file in (source, path))
    print(f"{path}: {after:.1f} MB, {before:.1f} MB before")


if __name__ == "__main__":
    command_line(main)
