"""Run ComfyUI with this pack in the foreground: `make serve PORT=8188`. Unknown arguments go to ComfyUI."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from .environment import say
from .host import ADDRESS, SERVE_BASE, check_port, prepare_base, server_command


def main() -> None:
    parser = argparse.ArgumentParser(prog="make serve", description=__doc__)
    parser.add_argument("--port", type=int, default=8188)
    options, rest = parser.parse_known_args()
    check_port(options.port)
    base = prepare_base(SERVE_BASE)
    command = [*server_command(base, options.port), *rest]
    say(f"ComfyUI will be at http://{ADDRESS}:{options.port} in a few seconds; Ctrl-C stops it")
    say(f"its models, input and output are in {base}")
    if os.name == "nt":
        sys.exit(subprocess.run(command).returncode)
    os.execv(command[0], command)  # signals then reach ComfyUI itself, which knows how to stop


if __name__ == "__main__":
    main()
