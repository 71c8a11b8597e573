"""The command line that toy_scenes and toy_birds share: options, messages, and a new folder."""
import argparse
import sys
from pathlib import Path

from common.files import new_folder
from common.run import UserError


def main(things, pictures, splits, contents, write, arguments=None):
    """Write toy data as files; returns the exit code.

    things, pictures, contents: words for the help and the last line. splits: {split: usual number of
    pictures}. write(folder, seed, counts) fills the folder with counts[split] pictures of every split.
    """
    parser = argparse.ArgumentParser(f"python -m data.toy_{things}",
                                     description=f"Write toy {things} as files.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument("--seed", type=int, default=0,
                        help=f"another seed gives other {pictures} (default 0)")
    parser.add_argument("--count", type=int, help=f"{pictures} per split (default {splits})")
    options = parser.parse_args(arguments)
    counts = splits if options.count is None else dict.fromkeys(splits, options.count)
    try:
        if options.seed < 0 or not 1 <= min(counts.values()) < 100_000:
            raise UserError("--seed must be 0 or more, --count between 1 and 99999.")
        with new_folder(options.out) as folder:
            write(folder, options.seed, counts)
    except UserError as error:
        print(f"toy_{things}: {error}", file=sys.stderr)
        return 2
    print(f"wrote {sum(counts.values())} {things} {counts}, {contents}, to {options.out}; "
          f"open {options.out / 'overview.png'} first")
    return 0
